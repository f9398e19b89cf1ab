"""Evaluation of models, Checkpoints and wrapped apps: stores their answers, grades and compares them.

suites        prompts for harmlessness, helpfulness and over-refusal, without prompts that were trained on
generations   subjects, and how each of them answers prompts
grades        grades of single answers by critics and rewards
graders       the graders of a suite's answers
inference     best-of-n and self-consistency, as further subjects
refusals      full compliance, full refusal, partial refusal; agreement with human labels
claims        a critic that judges long answers claim by claim
figures       means, shares and paired differences with 95 % intervals
ratings       Bradley-Terry and Elo with bootstrap intervals; the Pareto front
plots         the figures as SVG
folder        an evaluation on disk: generates answers, grades them, and has a judge compare subjects
summary       the results of an evaluation, as figures and tables
"""
