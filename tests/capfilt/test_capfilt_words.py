"""Words in scripts with and without spaces."""

import pytest

from capfilt.select import rules
from capfilt.select.words import count_words, joined, words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a dog - on  grass", 5),  # as always: between spaces
        ("", 0),
        ("강아지 한 마리", 3),  # Korean has spaces
        ("कुत्ता घास पर", 3),
        ("一只红色的狗在草地上", 5),  # ten letters in twos
        ("红色的", 2),  # rounded up
        ("红\uff0c蓝。", 2),  # punctuation ends a run and is no word
        ("赤いドレス", 3),
        ("がけ", 1),
        ("か\u3099け", 1),  # the same with a combining mark
        ("กำลังกินข้าว", 3),  # nine letters, as marks above are not counted: ก ำ ล ง ก น ข า ว
        ("ສະບາຍດີ", 2),  # ສ ະ is a vowel that is a letter, then ບ າ ຍ ດ: six
        ("ឆ្កែ", 1),  # two letters with marks
        ("ခွေး", 1),
        ("iPhone手机壳 2023", 4),  # iPhone, 手机 and 壳, 2023
        ("狗🐶", 2),
        ("狗👩‍🚀", 2),  # an emoji of three code points is one run
        ("狗 🐶", 2),
        ("狗\u200b猫", 1),  # an invisible character separates nothing
        ("\U00020000\U00020001", 1),
        ("฿100ราคา", 3),  # ฿100, and four letters
        ("狗\u3000猫", 2),  # a wide space is a space
    ],
)
def test_words_are_counted(text, count):
    assert count_words(text) == count


def test_rules_count_words_by_script():
    """Chinese alt-texts are neither too short nor too long for having no spaces."""
    broken = [rules.text_flags([text]) for text in ("一只红色的狗在草地上", "红色的", "红" * 40, "红" * 41)]
    assert broken == [[], ["web.words<3", "web.chars<6"], [], ["web.words>20"]]


def test_text_is_split_into_words():
    assert words("Men's T-shirt, RED (new!)") == ["men's", "t", "shirt", "red", "new"]
    assert words("L\u2019\u00e9t\u00e9 cafe\u0301") == ["l'\u00e9t\u00e9", "caf\u00e9"]  # composed
    assert words("कुत्ता घास") == ["कुत्ता", "घास"]  # vowel signs do not end a word
    assert words("红狗 dog犬") == ["红", "狗", "dog", "犬"]
    assert words("กินข้าว") == ["กิ", "น", "ข้", "า", "ว"]
    assert words("\U0001f436 !? ") == []
    assert [joined(words(text)) for text in ("中国", "red dog", "a中国 b")] == ["中国", "red dog", "a 中国 b"]
