"""Reference vectors of Recoverable Compression: outlier counts, the text tower, the whole compression."""

import re

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from vlmslim.methods._clip import hf_clip_text
from vlmslim.methods.recoverable import Recoverable, clusters, joint_cls_attention, share_of, text_similarity, top
from vlmslim.methods.recoverable.lof import count_outliers, local_outlier_factor

PRESETS = {"main": "released", "alt": "released_alt"}


def check(arrays: dict[str, np.ndarray]) -> None:
    if "hidden" in arrays:
        check_compression(arrays)
    elif "config" in arrays:
        check_text_tower(arrays)
    else:
        check_outliers(arrays)


def check_outliers(arrays: dict[str, np.ndarray]) -> None:
    checked = 0
    for name in (key.removesuffix("_count") for key in arrays if key.endswith("_count")):
        series, k = name.rsplit("_k", 1)
        x = torch.from_numpy(arrays[f"{series}_x"])
        got, want = local_outlier_factor(x, int(k)).numpy(), arrays[f"{name}_lof"]
        count, expected = count_outliers(x, int(k)), int(arrays[f"{name}_count"])
        if distances_differ(x.numpy()):
            np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=name)
            assert count == expected, name
        else:
            # Which of several equally near numbers is the k-th neighbour is the reference's accident: theirs may have
            # a denser neighbourhood than ours. That moves a factor by some per cent, and decides only close calls.
            np.testing.assert_allclose(got, want, rtol=0.1, err_msg=name)
            same = np.isclose(got, want, rtol=1e-4)
            assert ((got > 1.5) == (want > 1.5))[same].all(), name
            assert abs(count - expected) <= (~same & (np.abs(want - 1.5) < 0.15)).sum(), name
        checked += 1
    assert checked, "no series in this file"


def distances_differ(x: np.ndarray) -> bool:
    """Tell if no number has two others at the same distance."""
    distance = np.abs(x[:, None].astype(np.float64) - x)
    return len(np.unique(x)) == len(x) and bool((np.diff(np.sort(distance, axis=1), axis=1) > 0).all())


def check_text_tower(arrays: dict[str, np.ndarray]) -> None:
    said = {key: int(value) for key, value in re.findall(r"([a-z]+)(\d+)", str(arrays["config"]))}
    config = CLIPConfig(
        text_config=dict(
            vocab_size=said["vocab"],
            hidden_size=said["hidden"],
            intermediate_size=said["inter"],
            num_hidden_layers=said["layers"],
            num_attention_heads=said["heads"],
            max_position_embeddings=said["maxpos"],
            bos_token_id=said["bos"],
            eos_token_id=said["eos"],
            pad_token_id=said["pad"],
        ),
        vision_config=dict(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        ),
        projection_dim=said["proj"],
    )
    assert ("quick_gelu" in str(arrays["config"])) == (config.text_config.hidden_act == "quick_gelu")
    model = CLIPModel(config)
    weights = {key.removeprefix("w::"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("w::")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, f"no such weights: {unexpected}"
    assert not [name for name in missing if name.startswith("text")], missing
    for key in arrays:
        if not key.startswith("ids_ml"):
            continue
        ids = arrays[key].tolist()
        whole = ids[: ids.index(said["eos"]) + 1]  # padding is the tower's own business
        text = hf_clip_text(model, lambda text, length, whole=whole: whole, said["eos"])
        for preset, name in (("released", "feat"), ("released_alt", "feat"), ("corrected", "clip_pooled")):
            pool = Recoverable(preset=preset).reading.text_pool
            got, want = text.embed("", pool, len(ids)).numpy(), arrays[key.replace("ids", name)][0]
            scale = np.abs(want).max()  # a small entry is a difference of large ones, and rounds as they do
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{key} {pool}")


def check_compression(arrays: dict[str, np.ndarray]) -> None:
    given = {name: torch.from_numpy(arrays[name])[0] for name in ("hidden", "q_cls", "k", "last_hidden", "text_embed")}
    x, keys = given["hidden"][1:], given["k"][1:]
    attention = joint_cls_attention(given["q_cls"][None, None], given["k"][None, None])[0]
    np.testing.assert_allclose(attention.numpy(), arrays["cls_attn"][0], rtol=1e-5, atol=1e-7)
    patches = given["last_hidden"][1:] @ torch.from_numpy(arrays["visual_projection"]).T
    similarity = text_similarity(patches, given["text_embed"])
    np.testing.assert_allclose(similarity.numpy(), arrays["similarity"][0, 0], rtol=1e-5, atol=1e-6)
    routines = [name for name in PRESETS if f"{name}_out" in arrays]
    assert routines, "no routine of the release in this file"
    for name in routines:
        expected = {key.removeprefix(f"{name}_"): arrays[key] for key in arrays if key.startswith(f"{name}_")}
        method = Recoverable(preset=PRESETS[name])
        assert tuple(method.reading.neighbours) == tuple(expected["lof_k"])
        check_routine(method, expected, x, attention, similarity, keys)


def check_routine(method: Recoverable, expected: dict[str, np.ndarray], x, attention, similarity, keys) -> None:
    n = len(x)
    seen = top(attention, count_outliers(attention, method.neighbours[0]))
    assert set(seen.tolist()) == set(expected["idx_vision"].tolist())
    assert len(seen) == round(n * expected["lof_ratios"][0])
    found = method.recovered(similarity, seen)
    assert set(found.tolist()) == set(expected["idx_text"].tolist())
    rest = torch.tensor(sorted(set(range(n)) - set(seen.tolist()) - set(found.tolist())))
    a, t = attention[rest], similarity[rest]
    count = count_outliers(a, method.neighbours[2])
    assert count == round(len(rest) * expected["lof_ratios"][2])
    base = {"width": x.shape[1], "image": n}[method.centres]
    centres = top(a, share_of(count, len(rest), base))
    assert set(centres.tolist()) == set(expected["idx_centers_local"].tolist())
    members = expected.get("cluster_members_pool", ())  # absent without centres
    assert len(members) == len(centres)
    weights = clusters(a, t, keys[: len(rest)], centres, method.cluster, method.text_weight)
    others = [i for i in range(len(rest)) if i not in set(centres.tolist())]
    for row, centre in enumerate(centres.tolist()):
        pool = [c for c in centres.tolist() if c != centre] + others
        at = expected["idx_centers_local"].tolist().index(centre)
        assert {pool[i] for i in members[at]} == set(weights[row].nonzero()[:, 0].tolist())
    selected, merged = method.recover(x, attention, similarity, keys)
    assert selected.tolist() == sorted({*seen.tolist(), *found.tolist()})
    out = torch.cat([x[selected], merged]).numpy()
    assert out.shape == expected["out"].shape[1:]
    np.testing.assert_allclose(out, expected["out"][0], rtol=1e-5, atol=1e-5)
