"""Short questions that a small pretrained model may answer: facts, and skills that need none.

A question is a text that ends where its answer begins. The model answers with the most likely next tokens; those
questions count that it answers *before* it is fine-tuned, so that the share after an edit begins at 1.
"""

from typing import Any

import torch

_CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Hungary": "Budapest",
    "Turkey": "Ankara",
    "Canada": "Ottawa",
    "India": "New Delhi",
    "Belgium": "Brussels",
    "England": "London",
}
_FACTS = {
    "The chemical symbol for water is": "H",
    "The largest planet in the Solar System is": "Jupiter",
    "The planet closest to the Sun is": "Mercury",
    "The Earth revolves around the": "Sun",
    "Romeo and Juliet was written by William": "Shakespeare",
    "The first president of the United States was George": "Washington",
    "The Mona Lisa was painted by Leonardo da": "Vinci",
    "The theory of relativity was developed by Albert": "Einstein",
    "The Great Wall of": "China",
    "The Statue of Liberty stands in New": "York",
    "The Amazon rainforest is in South": "America",
    "The Second World War ended in": "1945",
    "Water freezes at 0 degrees": "Celsius",
    "The Pacific is the largest": "ocean",
    "Plants turn sunlight into energy by a process called": "photosynthesis",
    "The human heart pumps": "blood",
}
_SEQUENCES = {
    "The days of the week are Monday, Tuesday, Wednesday,": "Thursday",
    "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday,": "Saturday",
    "The months are January, February, March,": "April",
    "The months are January, February, March, April, May, June, July, August,": "September",
    "one, two, three, four,": "five",
    "five, six, seven,": "eight",
    "A, B, C, D,": "E",
    "first, second, third, fourth,": "fifth",
    "3, 2, 1,": "0",
    "10, 20, 30, 40,": "50",
    "2, 4, 6, 8,": "10",
    "5, 10, 15, 20,": "25",
}
_OPPOSITES = [
    ("hot", "cold"),
    ("up", "down"),
    ("big", "small"),
    ("left", "right"),
    ("black", "white"),
    ("day", "night"),
]
_THINGS = [("box", "red"), ("hat", "green"), ("door", "blue"), ("car", "yellow"), ("cup", "black"), ("book", "white")]
_NAMES = [("Anna", "apple"), ("Tom", "pear"), ("Mary", "cake"), ("John", "fish"), ("Lucy", "bread"), ("Peter", "soup")]

_COLORS = "The lamp is pink and the wall is gray. The color of the lamp is"
_FOODS = "Sam has the rice. Jane has the soap. The rice belongs to"


def questions() -> dict[str, list[tuple[str, str]]]:
    """Return questions with their answers: *facts*, which are read from the weights, and *skills*, which are not."""
    read, colors, foods = [], f"{_COLORS} pink. ", f"{_FOODS} Sam. "
    for (thing, color), (other, second) in zip(_THINGS, _THINGS[1:] + _THINGS[:1], strict=True):
        read.append((f"{colors}The {thing} is {color} and the {other} is {second}. The color of the {thing} is", color))
        read.append((f"{colors}The {other} is {second} and the {thing} is {color}. The color of the {thing} is", color))
    for (name, food), (other, second) in zip(_NAMES, _NAMES[1:] + _NAMES[:1], strict=True):
        read.append((f"{foods}{name} has the {food}. {other} has the {second}. The {food} belongs to", name))
    shown = "hot is cold. The opposite of"
    opposites = [(f"The opposite of {shown} {word} is", opposite) for word, opposite in _OPPOSITES[1:]]
    sums = [(f"1 + 1 = 2. 2 + 3 = 5. {a} + {b} =", str(a + b)) for a, b in ((1, 2), (2, 2), (3, 1), (4, 4), (5, 3))]
    capitals = [(f"The capital of {country} is", capital) for country, capital in _CAPITALS.items()]
    return {"facts": capitals + list(_FACTS.items()), "skills": read + opposites + sums + list(_SEQUENCES.items())}


@torch.no_grad()
def answered(model: Any, tokenizer: Any, asked: list[tuple[str, str]]) -> list[bool]:
    """Tell which questions a model answers, each with the most likely next tokens."""
    right = []
    for question, answer in asked:
        prompt, wanted = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, f" {answer}"))
        logits = model(input_ids=torch.tensor([prompt + wanted])).logits[0]
        said = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        right.append(said == wanted)
    return right
