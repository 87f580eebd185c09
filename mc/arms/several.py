"""`--mc_arms=several`: GistNet makes several vectors of a block, an entry each (`mc.mega_context`). Not in sessions,
stores and far histories."""

from mc.arm import Arm, Setting
from mc.config import MCConfig
from mc.gistnet import GISTS
from nanochat.common import UserError


class SeveralGists(Arm):
    SETTINGS = {
        "gists_per_block": Setting(
            2,
            "vectors that GistNet makes of a block, an entry each; sessions and far histories need 1",
            low=1,
            choices=GISTS,
        )
    }

    @classmethod
    def check(cls, config: MCConfig) -> None:
        if config.far_tokens > 0 and config.gists_per_block > 1:
            raise UserError(
                f"--mc_far_tokens={config.far_tokens} holds one gist per node, and "
                f"--mc_gists_per_block={config.gists_per_block}; use 1"
            )


ARM = SeveralGists
