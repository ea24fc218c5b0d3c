"""The emoji's pictures and captions, from a package of the same layout as the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from stages.base.prompts import read_prompts
from stages.embedded.noto_emoji import KEYWORDS, PICTURES, Emoji, load_emoji, write_prompts

CAT = {
    "name": "SMILING CAT FACE WITH HEART-SHAPED EYES",
    "unified": "1F63B",
    "image": "1f63b.png",
    "short_name": "heart_eyes_cat",
    "short_names": ["heart_eyes_cat"],
    "category": "Smileys & Emotion",
    "subcategory": "cat-face",
    "sort_order": 2,
    "has_img_google": True,
}
HOSPITAL = CAT | {
    "name": "HOSPITAL",
    "unified": "1F3E5",
    "image": "1f3e5.png",
    "short_name": "hospital",
    "short_names": ["hospital"],
    "category": "Travel & Places",
    "subcategory": "place-building",
    "sort_order": 1,
}
FLAG = CAT | {"unified": "1F3C1", "category": "Flags", "subcategory": "flag"}
CLOCK = HOSPITAL | {"unified": "1F550", "subcategory": "time"}


@pytest.fixture
def emoji(tmp_path: Path) -> Emoji:
    pictures, keywords = tmp_path / PICTURES / "package", tmp_path / KEYWORDS / "package" / "dist"
    (pictures / "img" / "google" / "64").mkdir(parents=True)
    keywords.mkdir(parents=True)
    (pictures / "emoji.json").write_text(json.dumps([CAT, HOSPITAL, FLAG, CLOCK]))
    words = {"😻": ["smiling_cat_with_heart_eyes", "animal", "love"], "🏥": ["hospital", "doctor"]}
    (keywords / "emoji-en-US.json").write_text(json.dumps(words))
    for row, alpha in ((CAT, 0), (HOSPITAL, 255)):
        picture = Image.new("RGBA", (64, 64), (255, 0, 0, alpha))
        picture.save(pictures / "img" / "google" / "64" / str(row["image"]))
    return load_emoji(tmp_path)


def test_pictures_are_on_white_and_in_the_order_of_the_standard(emoji: Emoji) -> None:
    assert emoji.names == ["hospital", "smiling cat with heart eyes"]
    assert emoji.categories == ["Travel & Places", "Smileys & Emotion"]
    red, white = emoji.images
    assert red[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert torch.equal(white, torch.ones(3, 64, 64))


def test_captions_are_the_names_and_the_name_with_key_words(emoji: Emoji) -> None:
    assert emoji.captions[1] == [
        "smiling cat with heart eyes",
        "smiling cat face with heart-shaped eyes",
        "heart eyes cat",
        "smiling cat with heart eyes, cat face",
        "cat face, animal",
        "smiling cat with heart eyes, animal, love",
        "smiling cat with heart eyes, love, animal",
    ]


def test_a_picture_that_holds_writing_is_not_mirrored(emoji: Emoji) -> None:
    assert emoji.can_be_mirrored.tolist() == [False, True]


def test_negative_prompts_are_the_neighbours_names(emoji: Emoji, tmp_path: Path) -> None:
    write_prompts(tmp_path, emoji)
    rows = [(row["prompt"], row["negative_prompt"]) for row in read_prompts(str(tmp_path / "negatives.csv"))]
    hospital, cat = emoji.names
    assert sorted(rows[:2]) == sorted([(hospital, cat), (cat, hospital)])
    assert sorted(rows[2:]) == sorted([(hospital, ""), (cat, "")])
    assert [row["prompt"] for row in read_prompts(str(tmp_path / "names.csv"))] == [name for name, _ in rows[:2]]
