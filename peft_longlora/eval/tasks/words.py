"""Words for keys: an adjective and a noun, joined by a hyphen as in RULER."""

from __future__ import annotations

import random

_ADJECTIVES = """amber ancient arctic autumn bitter blue bold brave bright brisk bronze calm careful clever cold copper
crimson curious daring deep distant eager early elder electric emerald empty faint fancy fierce final fragile frozen
gentle giant glad golden grand green grim hidden hollow honest humble icy idle indigo iron ivory jolly keen kind late
lazy little lively lonely loud lucky merry mild misty modest narrow noble odd orange pale patient plain polite proud
purple quick quiet rapid rare restless rough round royal rusty salty scarlet secret sharp silent silver simple sleepy
slow small smooth solid spare stern stormy strange sturdy sunny swift tame tidy tiny upper velvet violet warm weary
wild wise witty wooden young zealous"""
_NOUNS = """acorn anchor apple arrow badger banjo barrel basket beacon beaver bell blanket bottle bridge bucket butter
button cabin camel candle canyon carpet castle cedar cello chimney clock cloud comet compass coral cottage cradle crane
cricket crown dagger daisy desert dolphin donkey dragon drum eagle engine falcon feather fern ferry fiddle field finch
flute forest fountain fox garden garnet ginger glacier goose granite hammer harbor hazel hedge helmet heron hill
horizon island jacket jasmine jungle kettle kitten ladder lagoon lantern lemon library lily lizard locket lotus magnet
mango maple marble market meadow mirror monkey moose mountain museum needle nutmeg oak ocean olive orchard otter owl
paddle palace panther parrot pebble pepper pigeon pillow pine planet plum pocket pony prairie pumpkin puzzle rabbit
raven ribbon river robin rocket saddle sailor salmon saturn shadow shell shepherd spider squirrel stable statue stone
summit sunset table temple thistle thunder tiger timber tower trumpet tulip tunnel turtle umbrella valley vessel
village violin wagon walnut warbler water whistle willow window winter wolf zebra zephyr"""

ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def draw_words(rng: random.Random, n: int) -> list[str]:
    """n different words such as "amber-harbor"."""
    picks = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), n)
    return [f"{ADJECTIVES[p // len(NOUNS)]}-{NOUNS[p % len(NOUNS)]}" for p in picks]
