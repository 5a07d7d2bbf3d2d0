"""CLIP text towers, loaded from Hugging Face and from open_clip folders, against the libraries themselves."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from vlmslim.methods._clip import load_clip


def test_a_hf_clip(hf_folder):
    model = CLIPModel.from_pretrained(hf_folder).eval()
    clip = load_clip(hf_folder)
    ids = [100, 7, 8, 9, 101]
    with torch.no_grad():
        features = model.get_text_features(torch.tensor([ids]))
        want = getattr(features, "pooler_output", features)[0]
        padded = model.text_model(torch.tensor([ids + [101] * 5])).last_hidden_state[0, -1]
    torch.testing.assert_close(clip.embed("w7 w8 w9"), want)
    torch.testing.assert_close(clip.embed("w7 w8 w9", "last_pad", 10), model.text_projection(padded))
    long = " ".join(["w7"] * 50)
    assert clip.embed(long).isfinite().all()  # cut at what the tower reads
    patches = torch.randn(3, 16)
    torch.testing.assert_close(clip.project(patches), model.visual_projection(patches))
    normed = model.visual_projection(model.vision_model.post_layernorm(patches))
    torch.testing.assert_close(clip.project(patches, norm=True), normed)


@torch.no_grad()
def test_a_text_with_an_end_in_it_is_pooled_at_the_first(hf_folder, open_clip_folder):
    """As CLIP does. What follows the first end counts only for "last_pad"."""
    import open_clip

    model = CLIPModel.from_pretrained(hf_folder).eval()
    ids = torch.tensor([[100, 7, 101, 8, 101]])
    features = model.get_text_features(ids)
    clip = load_clip(hf_folder)
    torch.testing.assert_close(clip.embed("w7 <eot> w8"), getattr(features, "pooler_output", features)[0])
    torch.testing.assert_close(clip.embed("w7 <eot> w8"), clip.embed("w7"))
    states = model.text_projection(model.text_model(torch.cat([ids, torch.full((1, 3), 101)], 1)).last_hidden_state)
    torch.testing.assert_close(clip.embed("w7 <eot> w8", "last_pad", 8), states[0, -1])

    name, clip = f"local-dir:{open_clip_folder}", load_clip(open_clip_folder)
    text = "a red car <|endoftext|> a blue dog"
    expected = open_clip.create_model(name).encode_text(open_clip.get_tokenizer(name)([text]))[0]
    torch.testing.assert_close(clip.embed(text), expected)
    assert not torch.equal(clip.embed(text, "last_pad"), clip.embed("a red car", "last_pad"))


def test_an_open_clip(open_clip_folder):
    import open_clip

    name = f"local-dir:{open_clip_folder}"
    model, tokenizer = open_clip.create_model(name), open_clip.get_tokenizer(name)
    for clip in (load_clip(open_clip_folder), load_clip(name)):
        for text in ("a red car", "", "how many " * 40):
            torch.testing.assert_close(clip.embed(text), model.encode_text(tokenizer([text]))[0])
        assert clip.embed("a red car", "last_pad", 20).shape == (12,)
        patches = torch.randn(3, 16)
        torch.testing.assert_close(clip.project(patches), patches @ model.visual.proj)
        torch.testing.assert_close(clip.project(patches, norm=True), model.visual.ln_post(patches) @ model.visual.proj)


def test_an_open_clip_by_name_needs_its_weights(open_clip_folder, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    with pytest.raises(RuntimeError, match="nonsense"):
        load_clip("ViT-B-32:nonsense")
    with pytest.raises(ValueError, match="ViT-L-14-336-quickgelu:openai"):
        load_clip("ViT-B-32")
    with pytest.raises(ValueError, match="open_clip_config.json"):
        load_clip(str(tmp_path))
    open_clip.add_model_config(Path(open_clip_folder) / "open_clip_config.json")  # is nested, so it adds nothing
    flat = tmp_path / "Tiny-8.json"
    flat.write_text(json.dumps(json.loads((Path(open_clip_folder) / "open_clip_config.json").read_text())["model_cfg"]))
    open_clip.add_model_config(flat)
    by_name = load_clip(f"Tiny-8:{open_clip_folder}/open_clip_model.safetensors")
    torch.testing.assert_close(by_name.embed("a red car"), load_clip(open_clip_folder).embed("a red car"))


def test_a_clip_in_use_is_not_loaded_again(hf_folder):
    clip = load_clip(hf_folder)
    assert load_clip(hf_folder) is clip
