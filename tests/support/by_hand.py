"""One row through the layers of an unpatched model, with tokens dropped between them by hand."""

import torch
from doubles import Rule
from prompts import batch, visual
from tiny import DEPTH, IMAGE, VIDEO, tiny
from unpatched import merged_embeddings


class ByHand:
    """One row through the layers of an unpatched eager model.

    x, position, origin : (S, d), (S,) and (S,) of the tokens that are there
    size                : (S,) how many tokens each key stands for
    maps                : of each layer, what its tokens pay, (heads, S, S)
    """

    def __init__(self, family: str, row: list, generated: list[int] = ()):
        self.model = tiny(family, "eager")
        self.lm, self.inputs, self.maps = self.model.model.language_model, batch(self.model, [row]), []
        more = self.lm.embed_tokens(torch.tensor([*generated], dtype=torch.long))
        self.x = torch.cat([merged_embeddings(self.model, self.inputs)[0], more])
        self.position = self.origin = torch.arange(len(self.x))
        self.size = torch.ones(len(self.x))
        ids = self.inputs["input_ids"][0]
        self.text, self.images = int(((ids != IMAGE) & (ids != VIDEO)).sum()), visual(self.inputs)

    def drop(self, stay: list[torch.Tensor], closed: bool) -> None:
        """Keep of each image the places `stay`, indices into what is left of it."""
        gone = torch.zeros(len(self.x), dtype=torch.bool)
        for i, kept in enumerate(stay):
            lost = torch.ones(len(self.images[i]), dtype=torch.bool).index_fill(0, kept, False)
            gone |= torch.isin(self.origin, self.images[i][lost])
            self.images[i] = self.images[i][~lost]
        position = self.position - gone.cumsum(0) if closed else self.position
        self.x, self.position, self.origin = self.x[~gone], position[~gone], self.origin[~gone]
        self.size = self.size[~gone]

    def run(self, layer: int) -> None:
        size = len(self.x)
        mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
        mask = mask + self.size.log()
        rope = self.lm.rotary_emb(self.x[None], self.position[None])
        hook = self.lm.layers[layer].self_attn.register_forward_hook(lambda m, a, out: self.maps.append(out[1][0]))
        self.x = self.lm.layers[layer](self.x[None], attention_mask=mask, position_embeddings=rope)[0]
        hook.remove()

    def logits(self) -> torch.Tensor:
        return self.model.lm_head(self.lm.norm(self.x))


@torch.no_grad()
def by_hand(family: str, row: list, rule: Rule, generated: list[int] = (), until: int = DEPTH) -> ByHand:
    hand = ByHand(family, row, generated)
    if rule.acts_before_llm:
        prompt = hand.inputs["input_ids"][0]
        hand.drop([rule.chosen(len(x), prompt) for x in hand.images], rule.positions == "renumbered")
    for layer in range(until):
        if layer in rule.layers:
            stay = [rule.left(layer, len(x), hand.text) for x in hand.images]
            hand.drop(stay, rule.layer_positions == "renumbered")
        hand.run(layer)
    return hand
