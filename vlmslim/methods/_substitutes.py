"""The substitutes that methods take on models without what their papers read, such as a CLS token.

`Slim.substitutes` names the substitutes of a patch, and docs/models.md lists them by method and family.
"""

#: The name of each substitute, and what it is.
SUBSTITUTES = {
    "received": "the mean attention that a patch receives, in place of the attention that CLS pays to it",
    "loading": "the loading of a patch on its principal component, in place of the attention that CLS pays to it",
    "distance": "how little a token resembles the mean token of its view, in place of the logits of CLS",
    "random pivot": "a pivot drawn from seed and pixels, in place of the patch to which CLS pays most attention",
    "embeddings": "cosines of visual tokens to the input embeddings of the question, in place of those of a CLIP",
    "late merge": "tokens are merged after the projector, in place of before it",
    "full attention": "the next tower layer in which all patches see each other, in place of a layer of windows",
}
