"""Images among text: logits equal transformers', however prompts are cut and batched, and a broken image fails alone."""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters import write_adapter
from driver import PAGE_TOKENS, Driver, Ranks
from kvrun import models
from kvrun.engine.images import Image as Shown
from kvrun.engine.images import SequenceImages
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Row, Step
from kvrun.errors import ProtocolError
from kvrun.nn.build import load_model
from kvrun.nn.vision.sight import Sight
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.spec import Bounded, Residual
from kvrun.vision.tiles import Size, count
from pictures import CLEAR, PARTS, TALL, WIDE, Oracle, bomb, picture, prompt, text
from tiny import CLOSE, TIE, behind, distance

ROWS = ("llava_next", "llava_next_llama", "idefics2", "idefics2_whole", "gemma3_image", "gemma3_panned", "idefics", "idefics_patches")
PUBLISHED_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
COUNTED = Path(__file__).resolve().parents[2] / "router" / "tests" / "data"
ALL = Sampling(prompt_logprobs=True)  # so that the engine asks for the logits of every prompt token

END = 2  # of a text: what comes behind it does not look at its images
SEVERAL_TEXTS = {
    "an end behind an image": [text(3, 1), WIDE, text(4, 2), [END], text(6, 3)],
    "ends at every place": [[END], text(2, 4), [END], WIDE, [END, END], text(2, 5), TALL, text(3, 6), [END], text(3, 7), CLEAR, text(2, 8)],
    "an image right behind an end": [WIDE, [END], TALL, text(5, 9), [END]],
}


@pytest.fixture(scope="module")
def oracle(checkpoint):
    """row -> transformers' side of it."""
    return cache(lambda row: Oracle(checkpoint(row)))


def expected(oracle: Oracle, tokens: list[int], parts: list) -> torch.Tensor:
    return oracle.logits(tokens, [part for part in parts if isinstance(part, bytes)])


def features_of(oracle: Oracle, data: bytes) -> torch.Tensor:
    """What transformers makes of one image, [features, hidden]."""
    seen = oracle.pixels([data])
    with torch.inference_mode():
        return torch.cat([part.flatten(0, -2) for part in oracle.model.model.get_image_features(**seen).pooler_output])


def looked_at(ranks: Ranks, images: list[Shown]) -> int:
    """Tokens of memory that images take, by the published rule."""
    return ranks.engines[0].describe()["images"]["memory"] * len(images)


def logits_of(ranks: Ranks, prompts: list, heard: list, chunk: int = 512, adapter: int = 0) -> list[torch.Tensor]:
    """The logits of every token of prompts that run together, each in chunks."""
    driver = Driver(ranks.step)
    for sequence, (tokens, images) in enumerate(prompts):
        driver.add(sequence, tokens, 1, ALL, adapter, images=images, looked_at=looked_at(ranks, images))
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    while driver.running:
        heard.clear()
        rows = [driver.row(sequence, chunk) for sequence in driver.running]
        driver.turn(rows)
        assert not driver.errors
        for row, part in zip(rows, heard[0].split([row.tokens for row in rows])):
            found[row.sequence].append(part)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", ROWS)
def test_logits_of_text_and_images_in_one_batch_equal_transformers(row, world, engines, oracle, heard):
    ranks = engines(row, world)
    prompts = [prompt(ranks.engines[0].model.spec.images, parts) for parts in PARTS.values()]
    found = zip(prompts, PARTS.values(), logits_of(ranks, prompts, heard))
    worst = max(distance(logits, expected(oracle(row), tokens, parts)) for (tokens, _), parts, logits in found)
    print(f"{row}, world {world}: {worst:.1e} of the logits' standard deviation")
    assert worst < CLOSE


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
@pytest.mark.parametrize("row", ["llava_next", "idefics2", "idefics"])
def test_chunks_may_end_anywhere_in_an_image(row, chunk, engines, oracle, heard):
    ranks = engines(row)
    prompts = [prompt(ranks.engines[0].model.spec.images, parts) for parts in PARTS.values()]
    for (tokens, _), parts, logits in zip(prompts, PARTS.values(), logits_of(ranks, prompts, heard, chunk)):
        assert distance(logits, expected(oracle(row), tokens, parts)) < CLOSE


@pytest.mark.parametrize("size", [(1, 70), (70, 1), (2, 2), (16, 16), (33, 47), (200, 31)])
@pytest.mark.parametrize("row", ["llava_next", "idefics2_whole", "gemma3_image", "gemma3_panned"])
def test_features_of_odd_shapes_equal_transformers(row, size, engines, oracle):
    data = picture(*size, seed=7)
    assert distance(engines(row).engines[0].model.sight.features(data), features_of(oracle(row), data)) < CLOSE


@pytest.mark.parametrize("row", ["llava_next", "idefics2", "gemma3_image", "gemma3_panned", "idefics"])
def test_an_answer_goes_on_behind_its_image_and_beside_other_rows(row, engines, oracle):
    ranks = engines(row)
    driver, spec = Driver(ranks.step), ranks.engines[0].model.spec.images
    prompts = {key: prompt(spec, parts) for key, parts in PARTS.items()}
    for sequence, (tokens, images) in enumerate(prompts.values()):
        # transformers takes every id that stands for an image to be one, so none may be sampled.
        chosen, beside = Sampling(suppressed=(spec.token,), suppressed_until=12), looked_at(ranks, images)
        driver.add(sequence, tokens, 12, chosen, images=images, looked_at=beside)
        driver.turn()  # each joins rows that are already answering
    driver.run()
    for sequence, (key, (tokens, _)) in enumerate(prompts.items()):
        answer = driver.answers[sequence][:12]
        # Ids beyond the tokenizer's are padding and never chosen.
        logits = expected(oracle(row), tokens + answer, PARTS[key])[:, : ranks.engines[0].model.vocabulary_limit]
        assert behind(logits, answer, barred=(spec.token,)) < TIE


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("row", ["idefics", "idefics_patches"])
def test_behind_the_end_of_a_text_its_images_are_not_seen(row, chunk, engines, oracle, heard):
    ranks = engines(row)
    prompts = [prompt(ranks.engines[0].model.spec.images, parts) for parts in SEVERAL_TEXTS.values()]
    for (tokens, _), parts, logits in zip(prompts, SEVERAL_TEXTS.values(), logits_of(ranks, prompts, heard, chunk)):
        assert distance(logits, expected(oracle(row), tokens, parts)) < CLOSE


def seeing(change):
    """The model with what it says of images changed."""
    return lambda model: replace(model, images=change(model.images))


def with_encoder(**fields):
    return seeing(lambda images: replace(images, encoder=replace(images.encoder, **fields)))


def with_blocks(change):
    """Every mixer of the encoder's layers changed."""

    def layer(old):
        return replace(old, steps=tuple(Residual(step.norm, *map(change, step.mixers)) for step in old.steps))

    return seeing(lambda images: replace(images, encoder=replace(images.encoder, layers=tuple(map(layer, images.encoder.layers)))))


def with_stage(number: int, change):
    def staged(images):
        stages = list(images.stages)
        stages[number] = change(stages[number])
        return replace(images, stages=tuple(stages))

    return seeing(staged)


def swapped(stored):
    """Key and value change places."""
    return replace(stored, names=(*stored.names[:-2], stored.names[-1], stored.names[-2]))


MUTATIONS = {
    "one layer less": ("llava_next", seeing(lambda i: replace(i, encoder=replace(i.encoder, layers=i.encoder.layers[:-1])))),
    "no norm before the layers": ("llava_next", with_encoder(before=None)),
    "no norm after the layers": ("gemma3_image", with_encoder(after=None)),
    "another activation": ("llava_next", with_blocks(lambda m: replace(m, act="gelu") if hasattr(m, "act") else m)),
    "another scale of scores": ("idefics2", with_blocks(lambda m: replace(m, scale=0.3) if hasattr(m, "heads") else m)),
    "key and value swapped": ("gemma3_image", with_blocks(lambda m: replace(m, qkv=swapped(m.qkv)) if hasattr(m, "qkv") else m)),
    "another filter": ("llava_next", seeing(lambda i: replace(i, pixels=replace(i.pixels, filter=2)))),
    "another mean": ("idefics2", seeing(lambda i: replace(i, pixels=replace(i.pixels, mean=(0.48, 0.46, 0.41))))),
    "a smaller longest edge": ("idefics2", seeing(lambda i: replace(i, cutting=replace(i.cutting, each=Bounded(9, 23))))),
    "grids chosen otherwise": ("llava_next", seeing(lambda i: replace(i, cutting=replace(i.cutting, grids=((32, 32),))))),
    "a weight's offset": ("gemma3_image", with_stage(1, lambda s: replace(s, norm=replace(s.norm, offset=0.0)))),
    "fewer crops": ("gemma3_panned", seeing(lambda i: replace(i, cutting=replace(i.cutting, most=3)))),
    "crops of what is nearly square only": ("gemma3_panned", seeing(lambda i: replace(i, cutting=replace(i.cutting, ratio=4.0)))),
    "one look of the latents less": ("idefics2", with_stage(1, lambda s: replace(s, layers=s.layers[:-1]))),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(mutation, checkpoint, oracle, monkeypatch):
    row, change = MUTATIONS[mutation]
    honest = models.read(checkpoint(row))
    broken = change(honest[1])
    leftovers = (*broken.leftovers, "layernorm", "layrnorm", r"layers\.[1-9]\.")  # which its checkpoint has all the same
    monkeypatch.setattr(models, "read", lambda folder: (honest[0], replace(broken, leftovers=leftovers)))
    ours = load_model(checkpoint(row), dtype="float32").sight.features(WIDE)
    theirs = features_of(oracle(row), WIDE)
    assert ours.shape != theirs.shape or distance(ours, theirs) > CLOSE


def test_the_comparison_sees_tokens_of_an_image_that_look_back_only(engines, oracle, heard, monkeypatch):
    ranks, parts = engines("gemma3_image"), PARTS["one image"]
    monkeypatch.setattr(SequenceImages, "together", False)
    tokens, images = prompt(ranks.engines[0].model.spec.images, parts)
    (logits,) = logits_of(ranks, [(tokens, images)], heard)
    assert distance(logits, expected(oracle("gemma3_image"), tokens, parts)) > CLOSE


def test_the_comparison_sees_crops_that_look_at_each_other(engines, oracle, heard, monkeypatch):
    ranks, parts = engines("gemma3_panned"), PARTS["one image"]
    monkeypatch.setattr("kvrun.engine.images._ends", lambda places: np.full_like(places, places[-1]))
    tokens, images = prompt(ranks.engines[0].model.spec.images, parts)
    (logits,) = logits_of(ranks, [(tokens, images)], heard)
    assert distance(logits, expected(oracle("gemma3_panned"), tokens, parts)) > CLOSE


def test_an_adapter_changes_what_tokens_look_at_too(engines, checkpoint, heard, tmp_path):
    from peft import PeftModel

    write_adapter(tmp_path, checkpoint("idefics"), r=3, lora_alpha=4, target_modules="everything")
    ranks, changed = engines("idefics"), Oracle(checkpoint("idefics"))
    plain = Oracle(checkpoint("idefics"))
    changed.model = PeftModel.from_pretrained(changed.model, tmp_path)
    ranks.load(1, tmp_path)
    parts = PARTS["two of different sizes"]
    tokens, images = prompt(ranks.engines[0].model.spec.images, parts)
    (logits,) = logits_of(ranks, [(tokens, images)], heard, chunk=9, adapter=1)
    reference = expected(changed, tokens, parts)
    assert distance(logits, reference) < CLOSE
    assert distance(expected(plain, tokens, parts), reference) > 0.1


def test_the_tokens_of_an_image_must_be_computed_together_where_they_see_each_other(engines):
    ranks = engines("gemma3_image")
    tokens, images = prompt(ranks.engines[0].model.spec.images, [text(3, 1), WIDE, text(3, 2)])
    driver = Driver(ranks.step)
    driver.add(0, tokens, 1, images=images)
    with pytest.raises(ProtocolError, match="cut an image at 4 to 13, whose tokens see each other"):
        driver.turn(chunk=9)


def test_an_image_is_encoded_once_and_its_features_go_when_its_last_id_is_computed(engines, monkeypatch):
    ranks, read = engines("llava_next"), []
    features = Sight.features
    monkeypatch.setattr(Sight, "features", lambda self, data: read.append(data) or features(self, data))
    tokens, images = prompt(ranks.engines[0].model.spec.images, [text(3, 1), WIDE, text(30, 2), TALL])
    driver = Driver(ranks.step)
    driver.add(0, tokens, 4, images=images)
    held = []
    while driver.running:
        driver.turn(chunk=10)
        sequence = ranks.engines[0]._sequences._sequences.get(0)
        held.append(len(sequence.images._features))
    assert read == [WIDE, TALL]
    assert set(held) == {0, 1} and held[-1] == 0


def test_an_image_whose_pages_another_sequence_filled_is_not_encoded_again(engines, monkeypatch):
    ranks = engines("llava_next")
    tokens, images = prompt(ranks.engines[0].model.spec.images, [WIDE, text(22, 2)])
    driver = Driver(ranks.step)
    driver.add(0, tokens, 8, images=images)
    driver.turn()
    monkeypatch.setattr(Sight, "features", lambda self, data: pytest.fail("encoded again"))
    shared = driver._pages[0][: len(tokens) // PAGE_TOKENS]
    begin, own = len(shared) * PAGE_TOKENS, [driver.free.pop() for _ in range(2)]
    again = Step(
        2, [], [Admit(1, tokens, len(tokens), Sampling(), 0, images)], [Row(1, begin, len(tokens) - begin, [*shared, *own], True, [])]
    )
    assert [token.id for token in ranks.step(again).rows[0].tokens] == driver.answers[0][:1]


def test_an_image_in_pages_that_another_sequence_filled_is_looked_at_from_behind_them(engines):
    ranks = engines("idefics")
    tokens, images = prompt(ranks.engines[0].model.spec.images, [text(3, 1), WIDE, text(29, 2)])
    driver = Driver(ranks.step)
    driver.add(0, tokens, 8, images=images, looked_at=looked_at(ranks, images))
    driver.turn()
    shared = driver._pages[0][: len(tokens) // PAGE_TOKENS]
    begin, (last, *memory) = len(shared) * PAGE_TOKENS, [driver.free.pop() for _ in range(3)]
    assert begin > images[0].end
    admit = Admit(1, tokens, len(tokens), Sampling(), 0, images, (), memory)
    again = Step(2, [], [admit], [Row(1, begin, len(tokens) - begin, [*shared, last], True, [])])
    assert [token.id for token in ranks.step(again).rows[0].tokens] == driver.answers[0][:1]


BROKEN = {
    "no image": (b"<svg></svg>", "none of PNG, JPEG, WEBP, GIF"),
    "nothing": (b"", "none of PNG, JPEG, WEBP, GIF"),
    "cut short": (picture(40, 40, seed=5, kind="JPEG")[:-300], "cannot be read"),
    "a bomb": (bomb(40_000, 40_000), "pixels"),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_image_fails_its_own_sequence_only(broken, world, engines):
    ranks, (data, message) = engines("llava_next", world), BROKEN[broken]
    spec = ranks.engines[0].model.spec.images
    tokens, images = prompt(spec, [text(4, 1), WIDE, text(3, 2)])

    def run(with_broken: bool) -> Driver:
        ranks.reserve()
        driver = Driver(ranks.step)
        driver.add(0, tokens, 6, images=images)
        driver.add(1, text(9, 3), 6)
        if with_broken:
            driver.add(2, tokens, 6, images=[Shown(data, images[0].at, images[0].tokens)])
        driver.run()
        return driver

    healthy, shared = run(with_broken=False), run(with_broken=True)
    assert shared.errors.keys() == {2} and message in shared.errors[2] and shared.errors[2].startswith("bad_image: ")
    assert {i: shared.answers[i] for i in (0, 1)} == healthy.answers


def test_a_place_that_was_counted_otherwise_fails_its_sequence(engines):
    ranks = engines("llava_next")
    tokens, images = prompt(ranks.engines[0].model.spec.images, [WIDE, text(4, 1)])
    driver = Driver(ranks.step)
    driver.add(0, tokens[1:], 1, images=[Shown(WIDE, 0, images[0].tokens - 1)])
    driver.run()
    assert "counted as" in driver.errors[0]


WRONG = {
    "this model takes none": ("llama", [Shown(WIDE, 0, 2)]),
    "follow each other": ("llava_next", [Shown(WIDE, 2, 3), Shown(TALL, 4, 1)]),
    "within the 5 tokens": ("llava_next", [Shown(WIDE, 2, 4)]),
    "2 memory pages each, and it has 1": ("idefics", [Shown(WIDE, 2, 3)], [7]),
    "memory page 600 is not below": ("idefics", [Shown(WIDE, 2, 3)], [7, 600]),
}


@pytest.mark.parametrize("rule", WRONG)
def test_an_admit_that_breaks_a_rule_is_refused(rule, engines):
    row, images, *pages = WRONG[rule]
    with pytest.raises(ProtocolError, match=rule):
        engines(row).step(Step(1, [], [Admit(1, [5] * 5, 5, Sampling(), 0, images, (), *pages)], []))


def transformers_count(height: int, width: int, grids: list, side: int, patch: int) -> int:
    """Placeholders for an image by transformers' processor of LLaVA-NeXT."""
    from transformers import LlavaNextProcessor

    class Processor:
        image_processor = SimpleNamespace(image_grid_pinpoints=grids)
        patch_size, num_additional_image_tokens = patch, 1
        _get_unpadded_features = LlavaNextProcessor._get_unpadded_features

    return LlavaNextProcessor._get_number_of_features(Processor(), height, width, side, side) - 1


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Heights and widths of every magnitude, and some that divide evenly or not at all."""
    random = np.random.default_rng(seed)
    drawn = (2 ** random.uniform(0, 12.5, (count, 2))).astype(int).tolist()
    fixed = [(336, 336), (672, 672), (336, 1008), (40, 70), (1, 1), (1, 4000), (4000, 1), (480, 640), (1920, 1080), (333, 1000)]
    return fixed + [(height, width) for height, width in drawn]


def test_images_are_counted_as_transformers_counts_them():
    for height, width in sizes(200, seed=0):
        assert count(Size(height, width), 336, 24, PUBLISHED_GRIDS) == transformers_count(height, width, PUBLISHED_GRIDS, 336, 14)


def test_the_numbers_that_the_router_is_tested_with_are_transformers_own():
    counted = [[height, width, transformers_count(height, width, PUBLISHED_GRIDS, 336, 14)] for height, width in sizes(50, seed=1)]
    _hold("anyres.json", counted)


def test_the_crops_that_the_router_is_tested_with_are_transformers_own():
    from transformers import Gemma3ImageProcessorPil

    def crops(height: int, width: int) -> int:
        return len(Gemma3ImageProcessorPil().pan_and_scan(np.broadcast_to(np.uint8(0), (3, height, width)), 256, 4, 1.2))

    _hold("panned.json", [[height, width, crops(height, width)] for height, width in sizes(100, seed=2)])


def _hold(name: str, counted: list[list[int]]) -> None:
    if os.environ.get("KVRUN_UPDATE_SNAPSHOTS"):
        (COUNTED / name).write_text("[\n" + ",\n".join(f"  {json.dumps(line)}" for line in counted) + "\n]\n")
    assert json.loads((COUNTED / name).read_text()) == counted


@pytest.mark.parametrize("row", ["llava_next", "idefics2", "gemma3_image", "gemma3_panned"])
def test_the_published_rule_is_a_message_of_the_wire(row, engines):
    engine = engines(row).engines[0]
    rule = pb.Description(**engine.describe()).images
    spec = engine.model.spec.images
    assert (rule.marker, rule.token, rule.together) == (spec.marker, spec.token, row.startswith("gemma3"))
    if row == "llava_next":
        assert rule.WhichOneof("layout") == "tiled"
        assert (rule.tiled.tile_pixels, rule.tiled.tile_tokens, len(rule.tiled.grids)) == (16, 4, 5)
        assert (rule.tiled.grids[0].height, rule.tiled.grids[0].width) == (16, 32)
    elif row == "gemma3_panned":
        assert rule.WhichOneof("layout") == "panned"
        assert (rule.panned.features, rule.panned.shortest, rule.panned.most, rule.panned.ratio) == (9, 8, 4, 1.2)
        assert rule.panned.before_whole.startswith("Here is the original") and rule.panned.between_crops == " "
    else:
        assert rule.fixed.features == {"idefics2": 5, "gemma3_image": 9}[row]
        assert (rule.text, rule.border, rule.spaces) == (spec.text, spec.border, pb.Spaces.Value(spec.spaces.upper()))


def test_models_of_text_publish_no_rule(engines):
    assert not pb.Description(**engines("llama").engines[0].describe()).HasField("images")
