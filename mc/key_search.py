import torch
class KeySearch:
    def __init__(self, lens): self.lens, self.k = lens, None
    @property
    def n_blocks(self): return 0 if self.k is None else len(self.k)
    def append(self, k): self.k = k if self.k is None else torch.cat([self.k, k])
    def top(self, tail, cursor, m, also=None):
        l = self.lens.focus_logits(tail, self.k[None].to(tail.dtype), torch.tensor([cursor]))[0]
        i = l.topk(min(m, len(l))).indices
        i = torch.unique(torch.cat([i, also]))
        return i, l[i]
