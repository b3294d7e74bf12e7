import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from blip.data.settings import DataConfig
from blip.data.transforms import EvalTransform, TrainTransform, pixels_of, unnormalise
from blip.keyed import mix, permutation, scoped
from blip.nn.pixels import normalise
from blip.objectives.batch import Batch
from blip.text import clean_caption, clean_question, is_sided

PLAIN = {"crop_scale_min": 1.0, "augment_ops": 0}


def noise_image(width=97, height=61, seed=0):
    low = np.random.default_rng(seed).integers(40, 180, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def test_evaluation_is_bicubic_resizing_and_clip_normalisation():
    image = noise_image()
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = ((pixels - mean) / std).transpose(2, 0, 1)
    got = EvalTransform(32)(image)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() < 1e-5


def test_training_images_travel_as_bytes_and_are_normalised_as_in_evaluation():
    """To the bit, each alone and several together."""
    shown = [noise_image(seed=seed) for seed in range(3)]
    transform = TrainTransform(32, DataConfig(**PLAIN, flip=0.0))
    pixels = torch.stack([transform(image, 0) for image in shown])
    assert pixels.dtype == torch.uint8
    ids = torch.ones(3, 1, dtype=torch.int64)
    batch = Batch(pixels, ids, ids > 0, ["a", "b", "c"])
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.image, torch.stack([EvalTransform(32)(image) for image in shown]))
    assert batch.image is pixels
    assert torch.equal(moved.to(torch.device("cpu")).image, moved.image)


def test_evaluation_is_what_transformers_does_for_released_checkpoints():
    try:
        from transformers import BlipImageProcessorPil as Processor
    except ImportError:
        pytest.skip("this transformers has no processor that resizes with Pillow")
    theirs = Processor(size={"height": 48, "width": 48})(noise_image(), return_tensors="pt")["pixel_values"][0]
    assert (EvalTransform(48)(noise_image()) - theirs).abs().max() < 1e-5


def test_training_is_a_function_of_the_key():
    transform, image = TrainTransform(32, DataConfig()), noise_image()
    first = transform(image, 1, 2, 3)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert torch.equal(first, transform(image, 1, 2, 3))
    assert first.shape == (3, 32, 32)
    different = {transform(image, 1, 2, k).sum().item() for k in range(20)}
    assert len(different) == 20


def test_training_neither_reads_nor_moves_the_global_generators():
    transform, image = TrainTransform(32, DataConfig()), noise_image()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for k in range(20):
        transform(image, k)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_the_generators_come_back_after_an_error():
    before = random.getstate()
    with pytest.raises(ZeroDivisionError), scoped(1):
        raise ZeroDivisionError
    assert random.getstate() == before


def mirrored(config, sided):
    image = noise_image(32, 32)
    transform = TrainTransform(32, config)
    plain, other = pixels_of(image), pixels_of(ImageOps.mirror(image))
    seen = [transform(image, k, sided=sided) for k in range(200)]
    assert all(torch.equal(s, plain) or torch.equal(s, other) for s in seen)
    return sum(torch.equal(s, other) for s in seen)


def test_mirror_images_but_not_of_captions_with_sides():
    assert 70 < mirrored(DataConfig(**PLAIN), sided=False) < 130
    assert mirrored(DataConfig(**PLAIN), sided=True) == 0
    assert 70 < mirrored(DataConfig(**PLAIN, flip_sided_captions=True), sided=True) < 130
    assert mirrored(DataConfig(**PLAIN, flip=0.0), sided=False) == 0


def test_crops_show_at_least_their_share():
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[:, None] * 2, np.arange(100)[None] * 2
    config = DataConfig(crop_scale_min=0.5, augment_ops=0, flip=0.0)
    transform = TrainTransform(64, config)
    areas = []
    for k in range(100):
        crop = transform(Image.fromarray(ramp), k).float()
        height = (crop[0, -1].mean() - crop[0, 0].mean()) / 2 * 64 / 63
        width = (crop[1, :, -1].mean() - crop[1, :, 0].mean()) / 2 * 64 / 63
        areas.append((height * width / 1e4).item())
    assert min(areas) > 0.47
    assert min(areas) < 0.56
    assert max(areas) > 0.9


def test_unnormalise_undoes_normalise():
    image = noise_image()
    assert (unnormalise(normalise(pixels_of(image))) * 255).round().byte().numpy().transpose(
        1, 2, 0
    ).tolist() == np.asarray(image).tolist()


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)


def originals(image, magnitude):
    """The original's ten operations at a magnitude, written from its table of strengths: all images one may give."""
    from PIL import ImageEnhance

    m = magnitude / 10
    factor = m * 1.8 + 0.1
    signs = (1, -1)
    return {
        "Identity": [image],
        "AutoContrast": [ImageOps.autocontrast(image)],
        "Equalize": [ImageOps.equalize(image)],
        "Brightness": [ImageEnhance.Brightness(image).enhance(factor)],
        "Sharpness": [ImageEnhance.Sharpness(image).enhance(factor)],
        "ShearX": [affine(image, (1, s * 0.3 * m, 0, 0, 1, 0)) for s in signs],
        "ShearY": [affine(image, (1, 0, 0, s * 0.3 * m, 1, 0)) for s in signs],
        "TranslateX": [affine(image, (1, 0, s * 10 * m, 0, 1, 0)) for s in signs],
        "TranslateY": [affine(image, (1, 0, 0, 0, 1, s * 10 * m)) for s in signs],
        "Rotate": [image.rotate(s * 30 * m, Image.Resampling.BILINEAR, fillcolor=(128,) * 3) for s in signs],
    }


@pytest.mark.parametrize("magnitude", [5, 7])
def test_augmentation_has_the_originals_operations_strengths_and_frequencies(magnitude):
    image = noise_image(32, 32, seed=3)
    table = {}
    for name, results in originals(image, magnitude).items():
        for result in results:
            table.setdefault(pixels_of(result).numpy().tobytes(), name)
    transform = TrainTransform(32, DataConfig(crop_scale_min=1.0, flip=0.0, augment_ops=1, augment_magnitude=magnitude))
    n = 2000
    seen = Counter(table[transform(image, k).numpy().tobytes()] for k in range(n))
    nothing = 3 if magnitude == 5 else 1  # at 5, brightness and sharpness have factor 1
    unchanged = nothing / 10 + (10 - nothing) / 10 / 2
    assert abs(seen.pop("Identity") / n - unchanged) < 0.04
    assert len(seen) == 10 - nothing
    assert all(abs(count / n - 0.05) < 0.02 for count in seen.values())


def test_two_operations_at_magnitude_5_leave_42_percent_as_they_are():
    image = noise_image(16, 16, seed=3)
    transform = TrainTransform(16, DataConfig(crop_scale_min=1.0, flip=0.0, augment_magnitude=5))
    same = pixels_of(image)
    unchanged = sum(torch.equal(transform(image, k), same) for k in range(2000)) / 2000
    assert abs(unchanged - 0.65**2) < 0.04


CAPTIONS = {
    'A "big", red;dog: (sitting)!! on #1 grass...\n': "a big , red dog sitting on 1 grass",
    "  Don't   stop -  it's~fun * ": "don't stop - it's fun",
    "ÉCOLE à Paris.": "école à paris",
    "half a surrogate \ud83d here": "half a surrogate here",
}


@pytest.mark.parametrize("raw", CAPTIONS)
def test_captions_are_cleaned(raw):
    assert clean_caption(raw, 30) == CAPTIONS[raw]


@pytest.mark.parametrize("raw", ["", " \n", "...!", '"#~"'])
def test_captions_without_words_are_bad(raw):
    from blip.errors import BadSample

    with pytest.raises(BadSample, match="caption"):
        clean_caption(raw, 30)


def test_words_are_counted_after_cleaning():
    assert clean_caption("a . b ! c", 2) == "a b"
    assert len(clean_caption("word " * 100, 30).split()) == 30


def test_questions_lose_characters_without_a_gap():
    assert clean_question("What's in the U.S.A. #1 spot? ") == "what's in the usa 1 spot?"


def test_endless_captions_are_quick():
    import time

    began = time.perf_counter()
    for text in ("a" * 100_000, "a " * 50_000, " " * 99_999 + "a", ".!" * 50_000 + "b", "İ" * 100_000):
        clean_caption(text, 30)
    assert time.perf_counter() - began < 0.5


def test_a_caption_of_ten_megabytes_costs_no_more_than_a_page(tokenizer):
    import tracemalloc

    text = "dog " * 2_600_000
    tracemalloc.start()
    cleaned, question = clean_caption(text, 30), clean_question(text, 50)
    pieces = tokenizer.pieces(text, 35)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (cleaned, question) == (" ".join(["dog"] * 30), " ".join(["dog"] * 50))
    assert len(pieces) == 35
    assert most < 4 << 20  # a list of all words would take 150 MiB
    assert len(clean_caption("x" * 10_001, 30)) == 10_000


def test_sides_are_recognised():
    assert is_sided("a dog on the left of a cat")
    assert is_sided("turning Right")
    assert not is_sided("bright upright cleft")


def test_permutations_are_fixed_by_their_key():
    assert permutation(8, 0, 1).tolist() == permutation(8, 0, 1).tolist()
    orders = {tuple(permutation(6, 0, k).tolist()) for k in range(2000)}
    assert len(orders) > 600  # of 720
    assert sorted(permutation(1000, 3, 4).tolist()) == list(range(1000))
    assert mix(1, 2) != mix(2, 1)
    first = np.array([permutation(100, 7, k)[0] for k in range(3000)])
    assert abs(first.mean() - 49.5) < 2
    assert mix(0) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0
