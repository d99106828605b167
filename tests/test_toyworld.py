"""The toy web: held-out worlds share no fact with others, pages answer their questions, browsing
pays.
"""

import itertools

import pytest
from transformers import AutoTokenizer

from deepresearcher_min import corpus
from deepresearcher_min.corpus import RELATIONS, World, chain_of
from scripts import toy_tokenizer

pytestmark = pytest.mark.quick


def asked_facts(world: World) -> set[tuple[str, str, str]]:
    relations = {relation for table in RELATIONS.values() for relation in table}
    return {
        (n, r, v) for n, facts in world.facts.items() for r, v in facts.items() if r in relations
    }


def test_a_held_out_world_shares_no_fact_with_other_worlds():
    held_out = [asked_facts(World("held out", seed)) for seed in range(3)]
    others = [
        asked_facts(World("warm start", f"{seed} {n}")) for seed in range(2) for n in range(6)
    ]
    others += [asked_facts(World("training", seed)) for seed in range(3)]
    for one, other in itertools.product(held_out, others):
        assert not one & other
    # Other worlds do, now and then.
    assert any(one & other for one, other in itertools.combinations(others, 2))


def test_the_same_seed_makes_the_same_world_and_another_seed_another():
    one, same, other = (World("training", seed) for seed in (1, 1, 2))
    assert one.facts == same.facts and one.corpus.documents == same.corpus.documents
    assert one.questions(50, 0) == same.questions(50, 0)
    assert one.facts != other.facts


def test_questions_are_different_balanced_and_answered_by_the_pages():
    world = World("held out", 0)
    questions = world.questions(200, 0)
    assert len({q.text for q in questions}) == 200
    assert sorted(q.source for q in questions) == ["toy_1hop"] * 100 + ["toy_2hop"] * 100
    for question in questions:
        subject, relations = chain_of(question.text)
        for relation in relations:  # follow the chain by reading pages only
            page = world.corpus.pages.get(corpus.url_of(subject))
            subject = page.partition(f"The {relation} is ")[2].partition(".")[0]
        assert (subject,) == question.answers


def test_a_full_name_finds_the_page_and_its_summary_lacks_two_facts_in_three():
    world = World("training", 0)
    shown = total = 0
    for name in world.facts:
        found = world.corpus.search(name, 2)
        assert found[0].title == name
        for relation in RELATIONS[world.kind[name]]:
            total += 1
            shown += f"The {relation} is " in found[0].snippet
    assert 0.25 < shown / total < 0.42


def test_behaviour_rates_on_hand_made_cases(monkeypatch):
    from deepresearcher_min.trajectory import Question, Trajectory, Turn

    world = World("held out", 0)
    person = next(name for name, kind in world.kind.items() if kind == "person")
    city, mayor = (
        world.facts[person]["birthplace"],
        world.facts[world.facts[person]["birthplace"]]["mayor"],
    )
    question = Question(
        "q", f"What is the mayor of the birthplace of {person}?", (mayor,), "toy_2hop"
    )
    form = '<think>x</think><tool_call>{{"name": "%s", "arguments": {{"%s": ["{}"]}}}}</tool_call>'
    search = form % ("web_search", "query")
    browse = form % ("browse_webpage", "url_list")

    def rates(*turns: tuple[str, str, str]) -> dict[str, float]:
        made = tuple(
            Turn((0, 0), (0, 0), text, kind, observation) for kind, text, observation in turns
        )
        return corpus.behaviour_rates(
            [Trajectory(question, [1], [False], [0.0], made, None, "malformed")], world
        )

    titled = f"[... 'title': '{person}', ...]"
    lazy = rates(("search", search.format(person.split()[1]), titled))
    assert (lazy["full_name"], lazy["browse_when_needed"]) == (0, 0) and lazy["second_hop"] != lazy[
        "second_hop"
    ]
    url = corpus.url_of(person)
    good = rates(
        ("search", search.format(person), titled),
        ("browse", browse.format(url), f"The birthplace is {city}."),
        ("search", search.format(city), ""),
    )
    assert good == {"full_name": 1, "browse_when_needed": 1, "second_hop": 1}


def test_the_start_model_ships_small_with_its_own_tokenizer_and_a_card():
    folder = corpus.MODEL_DIR
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3_000_000
    assert len(AutoTokenizer.from_pretrained(folder)) == len(toy_tokenizer.build_tokenizer())
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == toy_tokenizer.build_tokenizer().get_vocab()
    )
    assert "No weight was set by hand" in (folder / "README.md").read_text()
