from pretrain.generation.page import ShownPrompt, page
from pretrain.generation.pieces import Piece

TEXT, IMAGE = Piece("text", text="a < b & \x1b[31m\nred"), Piece("image", file=b"123", suffix="png")


def test_the_page_holds_all_that_it_shows() -> None:
    shown = ShownPrompt("shard/<1>", [TEXT], [Piece("speech", file=b"1", suffix="wav")], [[IMAGE], []])
    made = page("run <x>", ["--to free"], [shown])
    assert "<h1>run &lt;x&gt;</h1>" in made and "shard/&lt;1&gt;" in made
    assert '<p class="text">a &lt; b &amp; \ufffd[31m\nred</p>' in made
    assert '<img src="data:image/png;base64,MTIz" alt="image">' in made
    assert '<audio controls src="data:audio/wav;base64,MQ==">' in made
    assert made.index("prompt</h3>") < made.index("truth</h3>") < made.index("sample 1</h3>")
    assert '<p class="note">nothing</p>' in made
    other = ShownPrompt("x", [Piece("video", file=b"1", suffix="mp4")], None, [])
    assert "video: a .mp4 file beside this page" in page("x", [], [other])


def test_without_a_truth_there_is_no_card_for_it() -> None:
    assert "truth</h3>" not in page("x", [], [ShownPrompt("prompt", [TEXT], None, [[TEXT]])])
