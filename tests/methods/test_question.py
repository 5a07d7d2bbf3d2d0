"""The user's question in prompts of many templates."""

import pytest

from vlmslim.methods._question import find_text

SYSTEM = "A chat between a curious human and an artificial intelligence assistant."
ASKED = "What colour is the car?\nAnswer in one word."
PROMPTS = {
    "vicuna": f"<s> {SYSTEM} USER:  \n{ASKED} ASSISTANT:",
    "vicuna, bare": f"<s> USER:  \n{ASKED} ASSISTANT:",
    "vicuna, answered": f"<s> {SYSTEM} USER:  \n{ASKED} ASSISTANT: Red.",
    "vicuna, second turn": f"<s> {SYSTEM} USER:  \nIs it day? ASSISTANT: Yes</s>USER: {ASKED} ASSISTANT:",
    "v0": f"<s> {SYSTEM}###Human:  \n{ASKED}###Assistant:",
    "mistral": f"<s>[INST]  \n{ASKED} [/INST]",
    "llama 2": f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n \n{ASKED} [/INST]",
    "chatml": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n\n{ASKED}<|im_end|>\n<|im_start|>assistant\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n\n{ASKED}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "image last": f"<s> {SYSTEM} USER: {ASKED}\n  ASSISTANT:",
    "no template": f"<s> \n{ASKED}",
    "cut off": f"<s> {SYSTEM} USER:  \n{ASKED}",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_question_is_found(name):
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
    assert find_text(PROMPTS[name], "question", special=special) == "What colour is the car?"
    assert find_text(PROMPTS[name], "user", special=special) == ASKED


def test_the_released_slip_reads_the_first_line_as_it_is():
    """The release decodes without `skip_special_tokens` and takes `split("\\n")[0]`."""
    assert find_text(PROMPTS["vicuna"], "system", special=["<s>"]) == f"<s> {SYSTEM} USER:  "


@pytest.mark.parametrize(
    "said, question",
    [
        (
            "Context: Below is a food web.\nWhich is a producer?\nA. bear\nB. oak\nAnswer with the letter.",
            "Which is a producer?",
        ),
        ("Context: A passage.\nWhat is it?\nIt goes on.\nWhich is it?\n(A) this?\n(B) that?", "Which is it?"),
        ("Context: Two lines\nof a text.\nComplete the sentence.\nA. is\nB. was", "Complete the sentence."),
        ("Hint: Give an integer.\nQuestion: How many are there?", "Question: How many are there?"),
        ("hint: Look closely.\nName the animal.\nOne word.", "Name the animal."),
        ("Context: nothing follows.", "Context: nothing follows."),
        ("Context: no question.\nA. yes\nB. no", "A. yes"),
        ("What is the context: this?\nIs it?", "What is the context: this?"),
    ],
)
def test_the_question_after_a_context_or_a_hint(said, question):
    assert find_text(f"USER: \n{said} ASSISTANT:", "question") == question


def test_a_template_of_ones_own():
    assert find_text("Q(what is it?)A(", "question", r"Q\((.*?)\)") == "what is it?"


def test_a_question_about_users_stays_whole():
    text = "<|im_start|>user\nWhat does USER: mean, ASSISTANT: or else?<|im_end|>\n<|im_start|>assistant\n"
    assert find_text(text, "question") == "What does USER: mean, ASSISTANT: or else?"
    assert find_text("USER: \n ASSISTANT:", "question") == ""
