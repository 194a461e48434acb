"""The studies: which settings, which methods, how many seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.study import baselines
from benchmarks.study.methods import ERM, LRW, MOLERE, Method
from benchmarks.study.problems import Setting
from torch_molere.weighting import FLOOR


@dataclass(frozen=True)
class Study:
    """A list of runs with one question.

    Attributes:
        name: on the command line.
        question: what it asks.
        settings, methods: every one with every other, but trusted validation only where there are trusted rows.
        seeds: 0 to seeds − 1.
        measures: columns of the table.
        drawn: so many of them, the first, are in the figure.
        on_test: False for choices between variants, which go by the selection set.
        margins: whether the change of margin by bucket is drawn.
        shares: the name of the study whose runs these are, seen by other measures; its own by default.
        finding: what came out, in words.
    """

    name: str
    question: str
    settings: Sequence[Setting]
    methods: Sequence[Method]
    seeds: int = 5
    measures: Sequence[str] = ("accuracy", "margin", "hard_third_by_margin", "easy_third_by_margin")
    drawn: int = 1
    on_test: bool = True
    margins: bool = False
    shares: str = ""
    finding: str = ""

    @property
    def folder(self) -> str:
        """Where its runs are stored, among all results."""
        return f"study-{self.shares or self.name}"

    def runs(self, seeds: int) -> list[tuple[Setting, Method, int]]:
        """Seed by seed, so that a stop leaves paired runs; plain training first, by which others split."""
        return [
            (setting, method, seed)
            for seed in range(seeds)
            for setting in self.settings
            for method in self.methods
            if method.apart != "trusted" or setting.trusted
        ]


FITTED = Setting("fitted", lr=0.02)
UNDERFITTED = Setting("under-fitted", rows=20_000, epochs=3, lr=0.006)

ALL_SIGNALS = ("loss", "margin", "probabilities", "label")


def molere(name: str, **arguments: Any) -> Method:
    """MOLERE with other arguments than the defaults."""
    return Method(f"MOLERE, {name}", "molere", arguments=arguments)


def held_out(name: str, **arguments: Any) -> Method:
    """MOLERE that leaves validation instances out of training all the time, as in the paper."""
    return molere(name, hold_out=True, **arguments)


HELD_OUT = held_out("held out")
TRAINED_ON_TOO = molere("trained on too", hold_out=False)
TRIMMED = held_out("trimmed", splitter="trimmed")
BOUNDED = held_out("expected error, half random, φ 1e-2", expected_error=True, splitter="mixed", weighting_lr=1e-2)


FLOORS = (0.0, 0.1, 0.3)


def floored(method: Method, floor: float) -> Method:
    """A method whose weights stay above a floor."""
    name = method.name if floor == 0.0 else f"{method.name}, floor {floor:g}"
    return replace(method, name=name, arguments={**method.arguments, "floor": floor})


ORDERING = Study(
    "ordering",
    "Is easy < random < hard < MOLERE, and is it the weights or the rows? φ at 1e-2 moves in these few steps about as "
    "far as at 1e-3 in ten times as many; MOLERE is also shown at its default of 1e-4.",
    (FITTED, UNDERFITTED),
    (
        ERM,
        *LRW.values(),
        *(method.control for method in LRW.values()),
        *(floored(method, FLOOR) for method in LRW.values()),
        MOLERE,
        HELD_OUT,
        held_out("held out, φ 1e-2", weighting_lr=1e-2),
    ),
    margins=True,
    finding="Not held: easy < random < hard in accuracy. With a φ at 1e-2 and no floor the weights cost points that"
    " the missing rows do not; on the way they move margin from easy to hard instances. With a floor of 0.3"
    " nearly all of that is gone, and what is left is near plain training on the same rows. Beside that an "
    "order does show in the under-fitted regime: weights learned against easy rows cost a point there, "
    "against random rows nothing is clear, and against hard rows they gain nearly as much as holding these "
    "out costs. In the fitted regime they change nothing clear. MOLERE at its defaults is as plain "
    "training.",
)

GROWTH = Study(
    "growth",
    "How does the order of easy, random, hard and learned validation depend on the number of training rows, of epochs "
    "and of hidden units, from under-fitted to fitted? Each setting differs from `fitted` in one of them.",
    (
        replace(FITTED, name="1,000 rows", rows=1_000),
        *(replace(FITTED, name=f"{epochs} epochs", epochs=epochs) for epochs in (4, 40)),
        *(replace(FITTED, name=f"{hidden} hidden units", hidden=hidden) for hidden in (16, 1_024)),
    ),
    (ERM, *LRW.values(), MOLERE, HELD_OUT),
    seeds=3,
    finding="No order of easy, random and hard validation holds from under-fitted to fitted: with a φ at 1e-2 and "
    "no floor none of the three is above plain training; they lose least where rows are few, the network is"
    " small or training short; and hard is nowhere clearly above random. MOLERE, always held out, is "
    "clearly below plain training only in the shortest training; at its defaults nowhere.",
)

SELECT = Study(
    "select",
    "Which validation instances, measured by what, should be the default, and how fast should φ be?",
    (
        FITTED,
        replace(FITTED, name="worst labels", labels="label_worst"),
        replace(FITTED, name="symmetric 40 %", labels="symmetric:0.4"),
        replace(FITTED, name="long tail 100", imbalance=100.0),
        UNDERFITTED,
    ),
    (
        ERM,
        HELD_OUT,
        TRAINED_ON_TOO,
        held_out("expected error, φ 1e-2", expected_error=True, weighting_lr=1e-2),
        held_out("expected error, random, φ 1e-2", expected_error=True, splitter="random", weighting_lr=1e-2),
        BOUNDED,
        held_out("expected error, half random, φ 1e-3", expected_error=True, splitter="mixed", weighting_lr=1e-3),
    ),
    measures=("accuracy", "balanced_accuracy", "hard_third_by_margin", "nll"),
    on_test=False,
    finding="What MOLERE gains on wrong labels comes from holding hard rows out, wrong ones among them: trained on "
    "too, nothing is gained. The same holding out is what it loses in the under-fitted regime. A bounded "
    "validation loss on partly random rows with a fast φ gains most on wrong labels, but varies from seed "
    "to seed and can lose elsewhere. No variant is best everywhere; what came of it is that rows are held "
    "out only where it pays (`select-hold-out`).",
)

TRUSTED = Method(
    "LRW, trusted rows", "fixed", "trusted", held_out=False, arguments={"signals": ALL_SIGNALS, "weighting_lr": 1e-2}
)
TRUSTED_BOUNDED = replace(
    TRUSTED,
    name="LRW, trusted rows, expected error",
    arguments={**TRUSTED.arguments, "expected_error": True},
)

UNTRUSTED = (ERM, LRW["Random"], LRW["Hard"], LRW["Hard"].control, MOLERE, HELD_OUT, TRAINED_ON_TOO)
TRUSTING = (TRUSTED, floored(TRUSTED, FLOOR), TRUSTED_BOUNDED)

NOISE = Study(
    "noise",
    "When do hard validation instances become wrong labels, and what stops it? Real human labels (CIFAR-10N) and "
    "symmetric noise; in the last setting 500 rows, trusted, carry their clean label for everyone.",
    (
        replace(FITTED, name="aggregate labels", labels="label_aggregate"),
        replace(FITTED, name="worst labels", labels="label_worst"),
        replace(FITTED, name="symmetric 20 %", labels="symmetric:0.2"),
        replace(FITTED, name="symmetric 40 %", labels="symmetric:0.4"),
        replace(FITTED, name="worst labels, 500 trusted", labels="label_worst", trusted=500),
        replace(FITTED, name="aggregate labels, lr 0.006", labels="label_aggregate", lr=0.006),
        replace(FITTED, name="worst labels, lr 0.006", labels="label_worst", lr=0.006),
        replace(FITTED, name="symmetric 40 %, lr 0.006", labels="symmetric:0.4", lr=0.006),
    ),
    (*UNTRUSTED, TRIMMED, BOUNDED, *TRUSTING),
    measures=("accuracy", "margin", "hard_third_by_margin", "nll", "ece", "train_accuracy"),
    finding="With labels this wrong, at a learning rate chosen for clean ones at which plain training fits them: "
    "MOLERE at its defaults is above plain training for the worse human labels and for both rates of "
    "symmetric noise; for the mildest noise nothing is clear. It is hard rows held out that gain, wrong "
    "ones among them: plain training without its hardest tenth has about two thirds of the gain, validation"
    " that leaves the hardest tenth of each batch to training (trimmed) next to nothing, and trained on too"
    " nothing or a small loss. MOLERE is less well calibrated. At the lower rate plain training is better "
    "by more than MOLERE gains at the higher, and MOLERE adds nothing clear to it; always held out, less "
    "than a point. A φ at 1e-2 without a floor loses with random and trusted validation and gains nothing "
    "with hard; with a bounded validation loss on partly random rows it gains most at the higher rate, not "
    "for every seed, and nothing at the lower.",
)

IMBALANCE = Study(
    "imbalance",
    "Long-tailed training sets, the test set balanced; in the last setting 10 rows of each class are "
    "also the validation set.",
    (
        replace(FITTED, name="long tail 10", imbalance=10.0),
        replace(FITTED, name="long tail 100", imbalance=100.0),
        replace(FITTED, name="long tail 100, 100 trusted", imbalance=100.0, trusted=100, trusted_by_class=True),
    ),
    (*UNTRUSTED, BOUNDED, *TRUSTING),
    measures=("balanced_accuracy", "worst_class", "accuracy", "nll"),
    finding="MOLERE is neither above nor below plain training here, at its defaults or always held out. A φ at 1e-2"
    " without a floor loses with random and hard validation, and gains nothing clear against a few trusted,"
    " balanced rows. With a floor of 0.3 it gains a point against them: the meta-gradient does its work "
    "where the validation set says something that the training set does not.",
)

SHIFT_RATES = (0.006, 0.02)
SHIFT = Study(
    "shift",
    "Does validation on artificially hard examples teach to see through the same corruptions, or others? 500 of the "
    "5,000 training rows carry two of four kinds, each at three strengths, for every method; learned reweighting "
    "validates on them. Accuracy on the clean test set, and mean accuracy over the strengths on copies of it with the "
    "kinds seen in validation and with those not.",
    tuple(
        Setting(f"{' and '.join(kinds)}, lr {lr:g}", lr=lr, trusted=500, trusted_shifts=kinds)
        for kinds in (("noise", "blur"), ("contrast", "pixelate"))
        for lr in SHIFT_RATES
    ),
    (
        ERM,
        MOLERE,
        HELD_OUT,
        replace(TRUSTED, name="LRW, random rows, φ 1e-2", apart="random"),
        replace(TRUSTED, name="LRW, shifted rows, φ 1e-2"),
        replace(TRUSTED, name="LRW, shifted rows, φ 1e-4", arguments={**TRUSTED.arguments, "weighting_lr": 1e-4}),
    ),
    measures=("accuracy", "accuracy_seen", "accuracy_unseen"),
    drawn=3,
    finding="Not shown: any gain from validating on shifted rows. Training on them is what helps: plain training is"
    " much better on the kinds of shift that 500 of its rows carry. Learned reweighting against the shifted"
    " rows changes nothing that could be measured at φ's default rate of 1e-4, and at 1e-2 loses on clean "
    "images and, more, on the very kinds it validates on. Random rows at that rate lose as well; shifted "
    "ones lose less on the kinds seen in one setting (noise and blur, lr 0.02), more in another (contrast "
    "and pixelation, lr 0.006), and are not clearly different in two. MOLERE at its defaults is nowhere "
    "clearly below plain training; always holding hard rows out, it loses on the kinds seen in three "
    "settings of four. Contrast says little here: the features' patches are contrast-normalised, and its "
    "two weaker strengths cost at most two points.",
)

MODELS = {"conv": 0.02, "resnet20": 0.05, "vit": 0.02}
"""The classifiers on images, with the learning rate best for plain training (`select-architecture`, one seed)."""
ON_IMAGES = Setting("on images", rows=2_000, side=16, epochs=8)
ARCHITECTURE = Study(
    "architecture",
    "Does it depend on the classifier? A convolutional net, a ResNet-20 and a small ViT, trained on the images "
    "themselves, halved to 16×16 pixels and without augmentation, for what two CPU cores allow: far from what these "
    "models can reach.",
    tuple(
        replace(ON_IMAGES, name=f"{model}, {name}", model=model, labels=labels, lr=lr)
        for model, lr in MODELS.items()
        for name, labels in (("clean labels", "label"), ("worst labels", "label_worst"))
    ),
    (ERM, LRW["Random"], MOLERE, HELD_OUT),
    seeds=3,
    measures=("accuracy", "margin", "hard_third_by_margin", "easy_third_by_margin", "nll", "train_accuracy"),
    finding="Nothing clear, with intervals of one to several points: MOLERE, at its defaults or always held out, is"
    " neither above nor below plain training with any of the three. LRW-Random, whose φ is fast and has no "
    "floor, is below it with ResNet-20 on clean labels.",
)
SELECT_ARCHITECTURE = Study(
    "select-architecture",
    "Which learning rate serves plain training of each classifier on clean images?",
    tuple(
        replace(ON_IMAGES, name=f"{model}, lr {lr:g}", model=model, lr=lr)
        for model in MODELS
        for lr in (0.006, 0.02, 0.05, 0.1)
    ),
    (ERM,),
    seeds=1,
    measures=("accuracy", "nll", "train_accuracy"),
    on_test=False,
)

SELECT_RANGE = Study(
    "select-range",
    "Does a least weight tame a φ that learns fast? No instance then weighs more than one divided by the floor times "
    "another. φ at 1e-2; trusted rows are trained on, too.",
    (
        replace(FITTED, name="clean"),
        replace(FITTED, name="worst labels, 500 trusted", labels="label_worst", trusted=500),
        replace(FITTED, name="long tail 100, 100 trusted", imbalance=100.0, trusted=100, trusted_by_class=True),
    ),
    (
        ERM,
        *(
            floored(method, floor)
            for method in (LRW["Random"], held_out("held out, φ 1e-2", weighting_lr=1e-2), TRUSTED)
            for floor in FLOORS
        ),
    ),
    seeds=3,
    measures=("accuracy", "worst_class", "hard_third_by_margin", "nll", "train_accuracy"),
    on_test=False,
    finding="It does. Without a floor a φ at 1e-2 puts the weight of a batch on few instances: MOLERE loses several"
    " points, LRW-Random two to four. With one of 0.3 MOLERE loses nothing clear on clean and long-tailed "
    "data and gains on wrong labels; LRW-Random still loses on wrong labels; and against a few trusted rows"
    " LRW gains a point on the long tail and loses half a point on wrong labels. 0.1 does a little better "
    "on wrong labels with MOLERE and LRW-Random, worse elsewhere. 0.3 became the default of the networks.",
)

RATES = (0.002, 0.006, 0.02)


def at_rates(setting: Setting, rates: Sequence[float]) -> tuple[Setting, ...]:
    """A setting at several learning rates of the classifier."""
    return tuple(replace(setting, name=f"{setting.name}, lr {lr:g}", lr=lr) for lr in rates)


SELECT_HOLD_OUT = Study(
    "select-hold-out",
    "When should validation instances be left out of training: always, never, or from the moment the classifier "
    "overfits (`hold_out='auto'`, the default)?",
    (
        UNDERFITTED,
        replace(UNDERFITTED, name="8 epochs", epochs=8),
        *at_rates(replace(FITTED, name="clean"), RATES),
        *at_rates(replace(FITTED, name="aggregate labels", labels="label_aggregate"), RATES[1:]),
        *at_rates(replace(FITTED, name="worst labels", labels="label_worst"), RATES),
        *at_rates(replace(FITTED, name="symmetric 40 %", labels="symmetric:0.4"), RATES[1:]),
        *at_rates(replace(FITTED, name="long tail 100", imbalance=100.0), RATES[1:]),
    ),
    (ERM, HELD_OUT, TRAINED_ON_TOO, molere("held out from overfitting on")),
    seeds=3,
    measures=("accuracy", "hard_third_by_margin", "nll", "train_accuracy"),
    on_test=False,
    finding="Always costs more than a point where the network does not fit its training set and gains up to three "
    "where it fits wrong labels; never costs next to nothing and gains nothing. From the moment the classifier "
    "overfits keeps much of the gain, though not for every seed, and none of the cost: this became the "
    "default. Its one clear loss here is a tenth of a point (8 epochs).",
)

SELECT_RATE = Study(
    "select-rate",
    "Which learning rate of the classifier serves plain training?",
    tuple(
        with_rate
        for setting in (
            FITTED,
            Setting("worst labels", labels="label_worst"),
            Setting("long tail 100", imbalance=100.0),
        )
        for with_rate in at_rates(setting, RATES)
    ),
    (ERM,),
    seeds=2,
    measures=("accuracy", "balanced_accuracy", "nll", "train_accuracy"),
    on_test=False,
)

SELECT_BASELINES = Study(
    "select-baselines",
    "Which strength serves each of the published baselines?",
    (
        FITTED,
        replace(FITTED, name="worst labels, lr 0.02", labels="label_worst"),
        Setting("worst labels, lr 0.006", labels="label_worst"),
    ),
    (ERM, *itertools.chain.from_iterable(baselines.TRIED.values())),
    seeds=2,
    measures=("accuracy", "balanced_accuracy", "nll", "train_accuracy"),
    on_test=False,
)

BASELINES = Study(
    "baselines",
    "Where does MOLERE stand beside published ways to weigh or choose training rows? Each is at the strength that was "
    "the most accurate in `select-baselines`, over its three settings and two seeds, and makes as many updates as "
    "plain training on its rows. Besides, Just Train Twice and RHO-Loss first train other models, and RHO-Loss looks "
    "at more rows for each update. Learning to Reweight and Meta-Weight-Net judge by a random tenth of the rows, which "
    "they do not train on, wrong labels among them.",
    (
        Setting("clean, lr 0.006"),
        Setting("clean, lr 0.02", lr=0.02),
        Setting("worst labels, lr 0.006", labels="label_worst"),
        Setting("worst labels, lr 0.02", labels="label_worst", lr=0.02),
        Setting("long tail 100, lr 0.006", imbalance=100.0),
    ),
    (ERM, *baselines.CHOSEN, MOLERE, HELD_OUT),
    measures=("accuracy", "worst_class", "hard_third_by_margin", "nll", "ece"),
    finding="MOLERE at its defaults and RGD are the only ones nowhere clearly below plain training in accuracy; "
    "MOLERE is clearly above it where wrong labels are fitted, RGD on the long tail. Who is best differs: "
    "RHO-Loss on wrong labels that are fitted, Just Train Twice on the long tail, both below plain training"
    " on clean labels. Learning to Reweight and Meta-Weight-Net, which judge by random rows that they do "
    "not train on, are below plain training almost everywhere.",
)

CALIBRATION = replace(
    BASELINES,
    name="calibration",
    question="Are the probabilities to be trusted? The runs of `baselines` by proper scores (negative log-likelihood, "
    "Brier score) and by expected calibration error in 15 bins: smaller is better in all three.",
    measures=("nll", "brier", "ece", "accuracy"),
    drawn=3,
    shares=BASELINES.name,
    finding="At its defaults MOLERE is as well calibrated as plain training, except on wrong labels that are "
    "fitted, where it leaves hard rows out: there it is more accurate and too sure of it. Always held out "
    "it is too sure everywhere but on wrong labels at the lower rate. The focal loss has the least negative"
    " log-likelihood on clean labels and on the long tail, RHO-Loss on wrong labels that are fitted.",
)

GAP = Study(
    "gap",
    "Is a gain more than overfitting to hard rows? Easy and hard thirds of the test set, by the margin and by the loss "
    "of another model; the gap between the loss on the training rows and on 2,000 others with labels of the same kind; "
    "and the test accuracy had one stopped at the first epoch that changes the gap by less than a tenth of it "
    "(`stable`), or at the least validation loss (`least`).",
    tuple(
        replace(FITTED, name=f"{name}, lr {lr:g}", labels=labels, lr=lr, validated=2_000)
        for name, labels in (("clean", "label"), ("worst labels", "label_worst"))
        for lr in (0.006, 0.02)
    ),
    (ERM, LRW["Random"], MOLERE, HELD_OUT),
    measures=(
        "accuracy",
        "hard_third_by_margin",
        "easy_third_by_margin",
        "hard_third_by_loss",
        "easy_third_by_loss",
        "gap",
        "accuracy_stable",
        "epoch_stable",
        "accuracy_least",
        "epoch_least",
    ),
    finding="The gain on wrong labels is not bought with easy instances: it is larger on the easy third than on the"
    " hard one. The gap does not tell who is better: with a fast φ (LRW-Random) it is smallest where the "
    "test accuracy is worst. Stopping early by either rule would have cost plain training and MOLERE "
    "accuracy in each setting: under this schedule the last epochs are the best. What the curves show "
    "besides: with a fast φ the accuracy collapses after the warm-up and comes back as the learning rate "
    "decays; weight on few instances of a batch makes for large steps (`select-range`).",
)

STUDIES = {
    study.name: study
    for study in (
        ORDERING,
        GROWTH,
        BASELINES,
        NOISE,
        IMBALANCE,
        SHIFT,
        GAP,
        CALIBRATION,
        ARCHITECTURE,
        SELECT,
        SELECT_RATE,
        SELECT_ARCHITECTURE,
        SELECT_HOLD_OUT,
        SELECT_BASELINES,
        SELECT_RANGE,
    )
}
