"""`--mc_arms=hidden`: GistNet reads the hidden states behind the base's middle layer, detached, in the place of a
block's embeddings.

They exist where the LM pass has run: not in sessions, stores and far histories, nor for a lens's reader."""

from mc.arm import Arm
from mc.config import MCConfig
from nanochat.common import UserError


class HiddenGists(Arm):
    @classmethod
    def check(cls, config: MCConfig) -> None:
        for name, value in (("far_tokens", config.far_tokens > 0), ("lens", config.lens != "bilinear")):
            if value:
                raise UserError(
                    f"--mc_arms=hidden has no hidden states for --mc_{name}={getattr(config, name)}; use embeddings"
                )
        if config.gist == "mean":
            raise UserError("--mc_arms=hidden has no effect with --mc_gist=mean, which has no weights")


ARM = HiddenGists
