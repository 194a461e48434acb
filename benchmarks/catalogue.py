"""The studies that ``python -m benchmarks STUDY`` runs."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.methods import DEFAULT, RANDOM, TRUSTED, Method, shuffled
from benchmarks.studies import (
    CONV,
    EASY,
    FEATURES,
    HARD,
    HARD_WIDE,
    L2R,
    L2R_MEMORY,
    META_WEIGHT_NET,
    MLP,
    OF_RANDOM,
    ONLINE,
    ONLINE_AT_ONCE,
    SOFT,
    SOFT_WIDE,
    TRUSTED_TUNED,
    TUNED,
    Claim,
    Study,
    trusted_but,
)

LEARNED = Method("learned", arguments={"splitter": "learned", "shrinkage": None})
LEARNED_HELD = LEARNED.but("learned, held out", hold_out=True)
AS_IN_PAPER = Method("as in the paper", arguments={"as_in_paper": True})

ORDER = Study(
    "order",
    "Is easy < random < hard validation, and hard above plain training, on clean data? Weights without shrinkage, "
    "rows of validation trained on too unless said otherwise.",
    (
        replace(MLP, name="MLP, decay 1e-4"),
        replace(MLP, name="MLP, decay 3e-3", weight_decay=3e-3),
        replace(MLP, name="MLP, decay 1e-2", weight_decay=1e-2),
        replace(MLP, name="MLP, rate 0.2", lr=0.2),
        replace(MLP, name="MLP, 10 epochs", epochs=10),
        CONV,
    ),
    (
        RANDOM,
        EASY,
        OF_RANDOM,
        SOFT,
        HARD,
        shuffled(HARD),
        HARD.but("hard, held out", hold_out=True),
        LEARNED,
        LEARNED_HELD,
        AS_IN_PAPER,
        DEFAULT,
        TUNED,
    ),
    measures=("accuracy", "best_accuracy", "hard_third", "middle_third", "easy_third", "margin", "ece", "weight_sd"),
    thirds=True,
    claims=(
        Claim("random validation serves better than easy", (), "random", "easy"),
        Claim("hard validation serves better than random", (), "hard", "random"),
        Claim("hard validation is above plain training", (), "hard", "plain"),
        Claim("it is the weights: hard is above the same weights shuffled", (), "hard", "hard, shuffled"),
        Claim("the default does no harm (not below plain by more than 0.3)", (), "default", "plain", -0.003),
        Claim("nor below plain training, tuned", (), "default, plain's rate and decay", "plain, tuned", -0.003),
    ),
)

TAIL = replace(MLP, rows=12_500, imbalance=100.0)
CONV_TAIL = replace(CONV, rows=12_500, imbalance=100.0)
CUE = replace(MLP, cue=0.98, weight_decay=1e-2)
BY_LABEL = trusted_but(
    "and the label",
    weighting="signals",
    signals=("loss", "running_loss", "margin", "running_margin", "meta_gradient", "label"),
)

RARE = Study(
    "rare",
    "Classes that are rare (a long tail, the test balanced) and groups that are (a mark that goes with the label, in "
    "the test at random): without trusted rows and with a few, on which every method trains.",
    (
        replace(TAIL, name="MLP, tail 100"),
        replace(TAIL, name="MLP, tail 100, standardised", standardised=True),
        replace(TAIL, name="MLP, tail 10", imbalance=10.0),
        replace(CONV_TAIL, name="conv net, tail 100"),
        replace(TAIL, name="MLP, tail 100, 20 trusted a class", trusted=200),
        replace(CONV_TAIL, name="conv net, tail 100, 20 trusted a class", trusted=200),
        replace(CUE, name="MLP, cue 98 %"),
        replace(CUE, name="MLP, cue 95 %", cue=0.95),
        replace(CUE, name="MLP, cue 98 %, 500 trusted", trusted=500),
    ),
    (
        RANDOM,
        SOFT,
        HARD,
        HARD_WIDE,
        SOFT_WIDE,
        DEFAULT,
        TUNED,
        TRUSTED,
        TRUSTED_TUNED,
        shuffled(TRUSTED),
        BY_LABEL,
        trusted_but("bound 20", max_weight=20.0, weighting_lr=1e-2),
        ONLINE,
        L2R,
    ),
    measures=("balanced", "worst_class", "worst_group", "best_accuracy", "nll", "train_accuracy", "weight_sd"),
    claims=(
        Claim(
            "long tail without trusted rows: ≥ +3 over plain, tuned",
            ("MLP, tail 100", "MLP, tail 100, standardised", "conv net, tail 100"),
            "default, plain's rate and decay",
            "plain, tuned",
            0.03,
            "balanced",
        ),
        Claim(
            "20 trusted a class: ≥ +2.5 over plain, tuned (MLP)",
            ("MLP, tail 100, 20 trusted a class",),
            "default, trusted, plain's rate and decay",
            "plain, tuned",
            0.025,
            "balanced",
        ),
        Claim(
            "20 trusted a class: ≥ +7 over plain, tuned (conv net)",
            ("conv net, tail 100, 20 trusted a class",),
            "default, trusted, plain's rate and decay",
            "plain, tuned",
            0.07,
            "balanced",
        ),
        Claim(
            "20 trusted a class: worst class ≥ +15",
            ("MLP, tail 100, 20 trusted a class", "conv net, tail 100, 20 trusted a class"),
            "default, trusted",
            "plain",
            0.15,
            "worst_class",
        ),
        Claim("cue 98 %, 500 trusted: ≥ +4", ("MLP, cue 98 %, 500 trusted",), "default, trusted", "plain", 0.04),
        Claim("cue 98 %, none trusted, hard, bound 20: ≥ +4", ("MLP, cue 98 %",), "hard, bound 20", "plain", 0.04),
    ),
)

NEXT = replace(MLP, labels="next:0.45")
HUMAN = replace(CONV, augment="", labels="label_worst", rows=10_000)

WRONG = Study(
    "wrong",
    "Labels that are wrong, at random, to one other class, or by people (CIFAR-10N, worst): without trusted rows and "
    "with some, on which every method trains. The tests are clean.",
    (
        replace(MLP, name="MLP, 40 % at random", labels="random:0.4"),
        replace(MLP, name="MLP, 40 % at random, 500 trusted", labels="random:0.4", trusted=500),
        replace(NEXT, name="MLP, 45 % to the next class"),
        replace(NEXT, name="MLP, 45 % to the next class, 100 trusted", trusted=100),
        replace(NEXT, name="MLP, 45 % to the next class, 500 trusted", trusted=500),
        replace(NEXT, name="MLP, 20 % to the next class, 500 trusted", labels="next:0.2", trusted=500),
        replace(CONV, name="conv net, 40 % at random", labels="random:0.4"),
        replace(HUMAN, name="conv net, 40 % at random, 1,000 trusted", labels="random:0.4", trusted=1_000),
        replace(HUMAN, name="conv net, people's worst, 1,000 trusted", trusted=1_000),
    ),
    (
        RANDOM,
        SOFT,
        HARD,
        OF_RANDOM.but("random, expected error", val_loss="expected error"),
        DEFAULT,
        TUNED,
        TRUSTED,
        TRUSTED_TUNED,
        shuffled(TRUSTED),
        trusted_but("λ 1", shrinkage=1.0),
        ONLINE,
        ONLINE_AT_ONCE,
        L2R,
        L2R_MEMORY,
        META_WEIGHT_NET,
    ),
    claims=(
        Claim(
            "45 % to one class, 500 trusted: ≥ +12 over plain",
            ("MLP, 45 % to the next class, 500 trusted",),
            "default, trusted",
            "plain",
            0.12,
        ),
        Claim(
            "≥ +5 over plain at its best epoch",
            ("MLP, 45 % to the next class, 500 trusted",),
            "default, trusted",
            "plain",
            0.05,
            minus="best_accuracy",
        ),
        Claim(
            "≥ +8 over random weights",
            ("MLP, 45 % to the next class, 500 trusted",),
            "default, trusted",
            "random weights",
            0.08,
        ),
        Claim(
            "≥ +8 over shuffled weights",
            ("MLP, 45 % to the next class, 500 trusted",),
            "default, trusted",
            "default, trusted, shuffled",
            0.08,
        ),
        Claim(
            "above plain, tuned",
            ("MLP, 45 % to the next class, 500 trusted", "MLP, 40 % at random, 500 trusted"),
            "default, trusted, plain's rate and decay",
            "plain, tuned",
        ),
        Claim(
            "40 % at random, conv net that memorises, 1,000 trusted: ≥ +10 over plain",
            ("conv net, 40 % at random, 1,000 trusted",),
            "default, trusted",
            "plain",
            0.10,
        ),
        Claim(
            "≥ +2 over its best epoch",
            ("conv net, 40 % at random, 1,000 trusted",),
            "default, trusted",
            "plain",
            0.02,
            minus="best_accuracy",
        ),
        Claim("people's worst: ≥ +6", ("conv net, people's worst, 1,000 trusted",), "default, trusted", "plain", 0.06),
        Claim(
            "≥ +1 over its best epoch",
            ("conv net, people's worst, 1,000 trusted",),
            "default, trusted",
            "plain",
            0.01,
            minus="best_accuracy",
        ),
        Claim(
            "without trusted rows not below plain by more than 0.3",
            ("MLP, 40 % at random", "MLP, 45 % to the next class", "conv net, 40 % at random"),
            "default",
            "plain",
            -0.003,
        ),
    ),
)

FINETUNE = Study(
    "finetune",
    "A head of two hidden layers on frozen ImageNet features (EfficientNet-Lite0) of CIFAR-10, soon memorised: "
    "what practitioners do.",
    (
        replace(FEATURES, name="clean"),
        replace(FEATURES, name="tail 100", rows=10_000, imbalance=100.0),
        replace(FEATURES, name="tail 100, 20 trusted a class", rows=10_000, imbalance=100.0, trusted=200),
        replace(FEATURES, name="45 % to the next class, 500 trusted", labels="next:0.45", trusted=500),
        replace(FEATURES, name="people's worst, 500 trusted", labels="label_worst", trusted=500),
        replace(FEATURES, name="people's worst", labels="label_worst"),
    ),
    (RANDOM, SOFT, HARD, DEFAULT, TUNED, TRUSTED, TRUSTED_TUNED, ONLINE, ONLINE_AT_ONCE, L2R, L2R_MEMORY),
    claims=(
        Claim("clean: not below plain by more than 0.3", ("clean",), "default", "plain", -0.003),
        Claim(
            "45 % to one class: ≥ +12 over plain",
            ("45 % to the next class, 500 trusted",),
            "default, trusted",
            "plain",
            0.12,
        ),
        Claim("people's worst: ≥ +5", ("people's worst, 500 trusted",), "default, trusted", "plain", 0.05),
        Claim(
            "not below plain's best epoch by more than 2",
            ("45 % to the next class, 500 trusted", "people's worst, 500 trusted"),
            "default, trusted",
            "plain",
            -0.02,
            minus="best_accuracy",
        ),
        Claim("tail, 20 a class: ≥ +2.5", ("tail 100, 20 trusted a class",), "default, trusted", "plain", 0.025),
    ),
)

FOUR_NINE = replace(
    MLP,
    side=None,
    standardised=False,
    classes=(7, 9),
    counts=(20, 4_970),
    rows=12_000,
    trusted=10,
    batch_of_trusted=10,
    model="lenet",
    lr=1e-3,
    weight_decay=0.0,
    schedule="constant",
    epochs=80,
)

REPRODUCE = Study(
    "reproduce",
    "Learning to Reweight's experiment (Ren et al. 2018): 5000 rows of two classes, 99.5 % of them one; 5 + 5 trusted; "
    "momentum 0.9, rate 1e-3, 4,000 steps of 100, plain training twice as many. Sneaker against ankle boot.",
    (replace(FOUR_NINE, name="sneaker against boot, 99.5 %"),),
    (
        Method("plain, twice the steps", "plain", training={"epochs": 160}),
        Method("class-balanced, twice the steps", "balanced", 0.9999, training={"epochs": 160}),
        RANDOM,
        L2R,
        TRUSTED,
    ),
    grid=False,
    claims=(Claim("≥ 40 over plain (50 %)", (), "Learning to Reweight", "plain, twice the steps", 0.4),),
)

PEERS = tuple(
    Method(f"{name}, {symbol} {strength:g}", kind, strength, family=name)
    for name, kind, symbol, strengths in (
        ("focal loss", "focal", "γ", (0.5, 1.0, 2.0)),
        ("generalised cross-entropy", "gce", "q", (0.1, 0.4, 0.7)),
        ("RGD", "rgd", "τ", (0.5, 1.0, 3.0)),
        ("class-balanced loss", "balanced", "β", (0.9, 0.99, 0.9999)),
        ("Just Train Twice", "twice", "λ", (2.0, 5.0)),
        ("RHO-Loss", "rho", "share", (0.1, 0.5)),
    )
    for strength in strengths
)

AGAINST_PEERS = Study(
    "peers",
    "Published ways to weigh, choose or bound, each at the strength that is best on the selection rows.",
    (
        replace(MLP, name="clean"),
        replace(TAIL, name="tail 100"),
        replace(NEXT, name="45 % to the next class, 500 trusted", trusted=500),
        replace(MLP, name="40 % at random, 500 trusted", labels="random:0.4", trusted=500),
    ),
    (*PEERS, DEFAULT, TRUSTED, L2R, META_WEIGHT_NET),
)

FIND = Study(
    "find",
    "Which score of a row finds the wrong labels: what training saw of it, what the reweighter knows, cleanlab's from "
    "four models that were not trained on it.",
    (
        replace(MLP, name="40 % at random", labels="random:0.4"),
        replace(NEXT, name="45 % to the next class, 500 trusted", trusted=500),
        replace(FEATURES, name="people's aggregate", labels="label_aggregate"),
        replace(FEATURES, name="people's worst, 500 trusted", labels="label_worst", trusted=500),
    ),
    (DEFAULT, TRUSTED, Method("cleanlab", "cleanlab")),
    grid=False,
    find=True,
)

SHIFTED = replace(CONV, name="", augment="", trusted=500)
ON_X = TRUSTED.but("trusted, φ on x", weighting="inputs")
SHIFT = Study(
    "shift",
    "All training rows but 500 are corrupted, the tests are not, or otherwise: validation on rows of the target.",
    tuple(replace(SHIFTED, name=kind, shift=kind) for kind in ("noise", "contrast")),
    (RANDOM, DEFAULT, TRUSTED, TRUSTED_TUNED, shuffled(TRUSTED), ON_X, L2R),
    measures=(
        "accuracy",
        "best_accuracy",
        "accuracy_noise",
        "accuracy_blur",
        "accuracy_contrast",
        "accuracy_pixelate",
        "weight_sd",
    ),
)

STUDIES = {study.name: study for study in (ORDER, RARE, WRONG, FINETUNE, REPRODUCE, AGAINST_PEERS, FIND, SHIFT)}
