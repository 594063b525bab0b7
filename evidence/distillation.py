"""Distillation: three kept layers of a fine-tuned MiniLM, 500 labelled and 5,000 unlabelled sentences.

(a) labels alone, (b) the teacher's logits, (c) logits and hidden states; equal steps and learning rate, three seeds.
Only distillation can use the unlabelled sentences.
"""

from __future__ import annotations

from claim import Evidence
from common import copied, mean, quality, subject, treat
from leanformers.training import Teacher

SEEDS = (0, 1, 2)
LABELLED, ALL, EPOCHS, RATE = 500, 5500, 2.0, 2e-4
DROP = {"method": "drop-layers", "keep": 0.5}

with Evidence(
    "distillation",
    claim="A shallower student learns more from its teacher's outputs on unlabelled text than from few labels",
    paper="Hinton, Vinyals, Dean (2015), Distilling the Knowledge in a Neural Network, arXiv 1503.02531",
    seeds=SEEDS,
) as evidence:
    found: dict[str, list[float]] = {name: [] for name in ("teacher", "labels", "logits", "logits + hidden")}
    for seed in SEEDS:
        teacher = treat(subject("minilm", "sentiment", seed=seed), {"method": "fine-tune", "epochs": 2.0})
        found["teacher"].append(quality(teacher))
        teacher.teacher = Teacher(copied(teacher).model, teacher.task, teacher.tokenizer)

        few = treat(teacher, DROP, seed=seed)
        few.train(EPOCHS * ALL / LABELLED, RATE, limit=LABELLED)
        found["labels"].append(quality(few))
        distil = {
            "method": "distillation",
            "epochs": EPOCHS,
            "limit": ALL,
            "alpha": 1.0,
            "temperature": 2.0,
            "learning_rate": RATE,
        }
        found["logits"].append(quality(treat(teacher, DROP, distil, seed=seed)))
        inner = {**distil, "hidden": 1.0}
        found["logits + hidden"].append(quality(treat(teacher, DROP, inner, seed=seed)))
    accuracy = {name: mean(values) for name, values in found.items()}
    evidence.baseline = {"accuracy_labels_alone": accuracy["labels"], "accuracy_teacher": accuracy["teacher"]}
    evidence.result = {"accuracy": accuracy, "accuracy_by_seed": found}
    gain = 100 * (accuracy["logits"] - accuracy["labels"])
    evidence.check("Logits over labels alone, points", gain, "> 0")
    evidence.check(
        "Student with half the layers, share of the teacher",
        accuracy["logits"] / accuracy["teacher"],
        ">= 0.97",
    )
