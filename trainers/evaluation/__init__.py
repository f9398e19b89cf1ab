"""Evaluation: what a model, a Checkpoint or a wrapped app is worth, out of answers that are kept.

suites        prompts for harmlessness, helpfulness and over-refusal; none that was trained on
generations   the answers of each subject, one JSONL file a subject, whole or not at all
grades        what critics, reward models and refusal classifiers say of each answer
graders       who grades the answers to a suite
inference     best-of-n and self-consistency, as subjects of their own
refusals      full compliance, full refusal, partial refusal; agreement with human labels
claims        a critic that judges long answers claim by claim
figures       means, shares and paired differences with 95 % intervals
ratings       Bradley-Terry and Elo with bootstrap intervals; the Pareto front
plots         the figures as SVG
folder        an evaluation on disk: has subjects answer, answers graded, and subjects compared by a judge
summary       what an evaluation came to, in figures and tables
"""
