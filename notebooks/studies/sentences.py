"""Notebook 15: sentences about a hotel, made by a grammar, some of them with a wrong label."""

import numpy as np

NOUNS = ["room", "food", "staff", "bed", "view", "pool", "breakfast", "service"]
WORDS = {
    1: ["lovely", "clean", "fresh", "friendly", "superb", "warm"],
    0: ["dirty", "rude", "noisy", "cold", "stale", "broken"],
}


def about_a_hotel(n_train, n_test, seed):
    """Return texts, what each says (1 praise, 0 complaint), and the numbers of some to mislabel.

    The first n_train texts are for training; one in twenty of them is to get the wrong label. Each
    text has two clauses of one kind, and three in ten clauses are turned by "not".
    """
    rng = np.random.default_rng([seed, 15])

    def clause(praise):
        turned = rng.random() < 0.3
        return f"the {rng.choice(NOUNS)} was {'not ' * turned}{rng.choice(WORDS[praise ^ turned])}"

    truth = rng.integers(0, 2, n_train + n_test)
    texts = [f"{clause(int(t))} and {clause(int(t))}" for t in truth]
    return texts, truth, rng.choice(n_train, n_train // 20, replace=False)
