"""Noto emoji with captions: pictures from the npm package emoji-datasource-google, key words from emojilib.

Also the files that are made of them: prompts, and the pictures as a reference.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from stages.base.pictures import to_picture

IMAGE_SIZE = 64
PICTURES, KEYWORDS = "emoji-datasource-google@16.0.0", "emojilib@4.0.3"

# People are left out because they are too many for the training budget; flags, signs and clock faces because they are
# told apart by writing.
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")
WITHOUT = "time"

# Short names of pictures that hold writing, or whose mirror image is the picture of something else.
NOT_MIRRORED = """
100 zzz face_with_symbols_on_mouth money_mouth_face hotel love_hotel convenience_store department_store post_office
european_post_office bank hospital school bus ambulance police_car oncoming_police_car taxi oncoming_taxi fire_engine
busstop octagonal_sign 8ball mahjong slot_machine flower_playing_cards spades calendar date spiral_calendar_pad e-mail
pager bar_chart chart_with_upwards_trend chart_with_downwards_trend chart yen dollar euro pound moneybag ledger
newspaper rolled_up_newspaper admission_tickets ticket red_envelope first_place_medal second_place_medal
third_place_medal japan world_map earth_africa earth_americas earth_asia cd dvd vhs radio identification_card receipt
elevator calling fax musical_score musical_note notes musical_keyboard keyboard abacus label bookmark_tabs
page_facing_up memo metro waxing_crescent_moon first_quarter_moon moon waning_gibbous_moon last_quarter_moon
waning_crescent_moon first_quarter_moon_with_face last_quarter_moon_with_face crescent_moon
""".split()  # noqa: SIM905 a list of ninety literals reads worse


@dataclass(frozen=True)
class Emoji:
    """Pictures `[n, 3, 64, 64]` in [-1, 1] on white, with names, categories and captions; each name is a caption too."""

    images: Tensor
    names: list[str]
    categories: list[str]
    captions: list[list[str]]
    can_be_mirrored: Tensor

    def __len__(self) -> int:
        return len(self.names)


def load_emoji(cache: Path) -> Emoji:
    """Read pictures and key words; `npm` downloads their packages into `cache` first if they are not there."""
    pictures, keywords = (unpacked(package, cache) for package in (PICTURES, KEYWORDS))
    words = json.loads((keywords / "dist" / "emoji-en-US.json").read_text())
    rows = [row for row in json.loads((pictures / "emoji.json").read_text()) if is_chosen(row)]
    rows.sort(key=lambda row: int(row["sort_order"]))
    captions = [captions_of(row, words[character(row)]) for row in rows]
    return Emoji(
        images=torch.stack([read_picture(pictures / "img" / "google" / "64" / row["image"]) for row in rows]),
        names=[phrases[0] for phrases in captions],
        categories=[row["category"] for row in rows],
        captions=captions,
        can_be_mirrored=torch.tensor([row["short_name"] not in NOT_MIRRORED for row in rows]),
    )


def unpacked(package: str, cache: Path) -> Path:
    """The folder of an npm package's files."""
    folder = cache / package
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        shutil.unpack_archive(cache / archive, folder)
    return folder / "package"


def is_chosen(row: dict[str, Any]) -> bool:
    return row["has_img_google"] and row["category"] in CATEGORIES and row["subcategory"] != WITHOUT


def character(row: dict[str, Any]) -> str:
    return "".join(chr(int(code, 16)) for code in row["unified"].split("-"))


def captions_of(row: dict[str, Any], keywords: list[str]) -> list[str]:
    """The name first, then other names and the name with key words, in lower case."""
    name, *others = (word.replace("_", " ").lower() for word in keywords)
    names = [name, str(row["name"]).lower(), *(short.replace("_", " ") for short in row["short_names"])]
    kind = str(row["subcategory"]).replace("-", " ").replace(" & ", " ")
    with_words = [f"{name}, {a}, {b}" for a, b in zip(others, [*others[1:], *others[:1]], strict=True)]
    return list(dict.fromkeys([*names, f"{name}, {kind}", f"{kind}, {others[0] if others else name}", *with_words]))


def read_picture(path: Path) -> Tensor:
    """A picture `[3, 64, 64]` in [-1, 1] on white."""
    picture = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return torch.from_numpy(np.array(ground.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


def write_reference(folder: Path, emoji: Emoji) -> None:
    """Write the pictures as a folder for `reference=`: `reference.parquet` with image, prompt and category."""
    table = {"image": [to_webp(image) for image in emoji.images], "prompt": emoji.names, "category": emoji.categories}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "reference.parquet", compression="none")


def to_webp(image: Tensor) -> bytes:
    content = io.BytesIO()
    to_picture(image).save(content, "webp", quality=90, method=6)
    return content.getvalue()


def write_prompts(folder: Path, emoji: Emoji) -> None:
    """Write three files for `prompts=`, in random order.

    `prompts.csv`: every caption. `names.csv`: the names alone. `negatives.csv`: each name with a negative prompt, the
    name of its neighbour in Unicode's order, which is mostly of the same kind; then the names again, without one.
    """
    generator = torch.Generator().manual_seed(0)
    captions = [caption for phrases in emoji.captions for caption in phrases]
    shuffled = [captions[i] for i in torch.randperm(len(captions), generator=generator).tolist()]
    order = torch.randperm(len(emoji), generator=generator).tolist()
    names, neighbours = ([emoji.names[i + shift] for i in order] for shift in (0, -1))
    tables = {
        "prompts.csv": {"prompt": shuffled},
        "names.csv": {"prompt": names},
        "negatives.csv": {"prompt": names * 2, "negative_prompt": neighbours + [""] * len(names)},
    }
    for name, columns in tables.items():
        pyarrow.csv.write_csv(pa.table(columns), folder / name)
