"""The checker on right, open and wrong solutions: those that students hand in."""

import re
import tomllib
from pathlib import Path
from textwrap import indent

import pytest

import exercises
import runs
from exercises.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
METHODS = runs.method_names()
# each run of the checker starts Python once or twice
FIRST = pytest.mark.parametrize("method", [
    pytest.param(method, marks=[pytest.mark.slow] * (method != METHODS[0])) for method in METHODS])
OPEN = re.compile(r"^( +)raise NotImplementedError\(.*\)$", re.M)

# {method: {equation: ([bodies], what has to notice)}}, in the order of its file
WRONG = {
    "autoselect": {
        # the best first, not in the order of the image
        "hard_topk": (["""
ks = [k] * len(s) if isinstance(k, int) else [int(each) for each in k]
s = s if valid is None else s.masked_fill(~valid, -math.inf)
return [row.argsort(descending=True, stable=True)[:n] for row, n in zip(s, ks)]
"""], "hard_topk_by_hand"),
        # no z-score: the mean alone
        "zscore": (["""
s = s.float()
w = torch.ones_like(s) if valid is None else valid.to(s)
return (s - (s * w).sum(1, keepdim=True) / w.sum(1, keepdim=True)) * w
"""], "zscore_normalises_each_image"),
        # a softmax that sums to K, and the slope of each token by itself
        "_SoftTopK": (["""
ctx.save_for_backward(a := k[:, None] * (z / tau).masked_fill(~valid, -math.inf).softmax(1))
ctx.tau = tau
return a
""", """
(a,) = ctx.saved_tensors
return grad * a * (1 - a) / ctx.tau, None, None, None
"""], "soft_topk_sums_to_k"),
        # plain noise on unscaled features
        "vp_gate": (["""
a = per_token(a, v)
return (a + 1e-8).sqrt() * v + (1 - a + 1e-8).sqrt() * noise
"""], "gate_preserves_variance"),
        # no z-score: raw scores
        "AutoSelect.forward": (["""
a = soft_topk(self.token_scores(v, valid, generator), keep, tau, valid)
return self.gated(v, a, valid, generator), a
"""], "another_scale_changes_no_share"),
    },
    "stepprune": {
        # a mask that closes stop
        "close": (["return m.scatter(1, pick[:, None], -torch.inf)"], "pointer_and_close"),
        # the blend, forwards too
        "straight_through": (["return pi @ memory"], "straight_through_is_hard"),
        # all steps, those after stop too
        "log_probability": (["return pi.gather(2, picks[..., None])[..., 0].log().sum(1)"],
                            "what_comes_after_a_row_has_stopped"),
        # one step ahead
        "alive": (["return (1 - pi_stop).cumprod(1)"], "alive_by_hand"),
        # discount without alive
        "aggregate": (["""
steps = torch.arange(pi.shape[1]).to(pi)
return ((on * gamma ** steps)[:, None] @ pi[..., :-1])[:, 0]
"""], "aggregate_is_the_printed_sum[full]"),
        # counts the step that stops
        "expected_count": (["return (on * alive(pi[..., -1])).sum(1)"],
                           "expected_count_is_the_mean"),
    },
    "recon_selector": {
        # a mean of squares
        "distance": (["return (x - y).square().flatten(1).mean(1)"], "the_loss_is_the_printed_sum"),
        # the plain price
        "dead_zone": (["return alpha1 * share"], "the_dead_zone_is_flat"),
        # the logistic, a sigmoid's noise
        "gumbel_noise": (["""
u = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators])
u = u.clamp(1e-9, 1 - 1e-7)
return (u / (1 - u)).log().to(logits)
"""], "gumbel_noise_draws_from_the_softmax"),
        # a sigmoid in place of the softmax
        "hard_mask": (["""
soft = ((logits + noise) / tau)[..., 1].sigmoid()
return (soft > 0.5).to(soft) + (soft - soft.detach())
"""], "hard_mask_is_hard"),
        # zeros
        "put_masked": (["return mask.unsqueeze(-1) * x"], "put_masked_replaces"),
        # padding counted
        "kept_share": (["return mask.mean()"], "kept_share_leaves_padding_out"),
        # noise in every estimator, and padding that is kept
        "ReconSelector.mask": (["""
logits = self.selector(x, valid).to(x.dtype)
return hard_mask(logits, gumbel_noise(logits, generators), self.cfg.tau)
"""], "gumbel_noise_draws_from_the_softmax"),
        # the picture from the true features
        "ReconSelector.rebuild": (["""
rebuilt = self.features(put_masked(x, mask, self.masked), grid)
return rebuilt, self.image(x, grid, size)
"""], "dropped_content_does_not_leak"),
    },
}


def solution(method: str, file: Path, bodies: list[str], names: list[str]) -> str:
    """A student's file with these bodies of these equations."""
    main([method, "--only", *names, "--file", str(file)])
    text = file.read_text()
    assert len(OPEN.findall(text)) == len(bodies)
    for body in bodies:
        text = OPEN.sub(lambda match, body=body: indent(body.strip(), match[1]), text, count=1)
    file.write_text(text)
    return text


def verdicts(printed: str) -> dict:
    """{equation: its line}"""
    lines = [line for line in printed.splitlines() if re.match("PASS|FAIL|OPEN", line)]
    return {re.search(r"\) (\S+): |(all together): ", line)[1]: line for line in lines}


def check_quoted(name: str, printed: str) -> None:
    """The page shows what the checker says, but for figures, which a version of torch may move."""
    page = (ROOT / "exercises/README.md").read_text()
    quoted = re.search(rf"<!-- {name} -->\n```\n(.*?)```", page, re.S)[1]
    for line in printed.splitlines():
        assert re.sub(r"\d+[\d.e-]*", "#", line) in re.sub(r"\d+[\d.e-]*", "#", quoted), line


@FIRST
def test_what_is_open_fails_and_is_all_that_is_taken_out(method, tmp_path, capsys):
    file = tmp_path / "mine.py"
    main([method, "--file", str(file)])
    every = exercises.equations(runs.load_method(method))
    with pytest.raises(RuntimeError, match=f"{len(every)} of {len(every)} equations do not pass"):
        main(["check", method, "--file", str(file)])
    found = verdicts(capsys.readouterr().out)
    assert [*found] == [equation.name for equation in every]
    assert all(line.startswith("OPEN ") for line in found.values())
    there, here = (ROOT / f"{method}.py").read_text(), file.read_text()
    kept = [line for line in here.splitlines() if not OPEN.match(line)]
    assert {*kept} <= {*there.splitlines()} and here.count('"""') == there.count('"""')
    assert not re.search(r"^ +#.*\n+ +raise NotImplementedError", here, re.M)
    assert len(OPEN.findall(here)) == sum(len(equation.functions) for equation in every)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_projects_own_file_passes(method, capsys):
    main(["check", method, "--file", f"{method}.py"])
    found = verdicts(printed := capsys.readouterr().out)
    assert [*found][:-1] == [e.name for e in exercises.equations(runs.load_method(method))]
    assert all(line.startswith("PASS ") for line in found.values()), found
    if method == METHODS[0]:
        check_quoted("right", printed)


@FIRST
def test_typical_wrong_solutions_are_caught_each_by_itself(method, tmp_path, capsys):
    """All in one file: every other equation is judged as if there were none of them."""
    wrong = WRONG[method]
    solution(method, tmp_path / "mine.py", [b for bodies, _ in wrong.values() for b in bodies],
             [*wrong])
    capsys.readouterr()
    with pytest.raises(RuntimeError, match=f"^{len(wrong)} of .* do not pass: " + ", ".join(wrong)):
        main(["check", method, "--file", str(tmp_path / "mine.py")])
    found = verdicts(printed := capsys.readouterr().out)
    if method == METHODS[0]:
        check_quoted("wrong", printed)
    assert [*found] == [e.name for e in exercises.equations(runs.load_method(method))]
    for name, line in found.items():
        assert line.startswith("FAIL " if name in wrong else "PASS "), line
        if name in wrong:
            assert f": test_{wrong[name][1]}" in line, line


@pytest.mark.slow
def test_what_breaks_down_is_said_and_the_rest_is_judged(tmp_path, capsys):
    """A loop without an end, an end of Python, a function that is gone: in line, and in order."""
    file, names = tmp_path / "mine.py", ["hard_topk", "Scorer", "zscore", "vp_gate"]
    right = """
for layer in self.blocks:
    v = layer(v, src_key_padding_mask=None if valid is None else ~valid)
return self.head(self.norm(v)).squeeze(-1)
"""
    text = solution("autoselect", file, ["pass", right, "while True: pass",
                                         "__import__('os')._exit(3)"], names)
    file.write_text(text.replace("def hard_topk", "def best"))
    line = text.splitlines().index("    while True: pass") + 1
    with pytest.raises(RuntimeError, match="^3 of 4 .* do not pass: hard_topk, zscore, vp_gate"):
        main(["check", "autoselect", "--file", str(file), "--limit", "5", "--only", *names])
    assert [*verdicts(capsys.readouterr().out).values()] == [
        "FAIL Eq. (2) hard_topk: the file has no hard_topk",
        "PASS Eq. (3) Scorer: 2 tests",
        f"FAIL Eq. (4) zscore: after 5 s a test had not ended, in line {line}: does every loop "
        "end?",
        "FAIL Eq. (5) vp_gate: Python ended with exit code 3"]


@pytest.mark.slow
def test_what_is_wrong_beside_the_equations_shows_in_the_whole(tmp_path, capsys):
    file = tmp_path / "mine.py"
    text = (ROOT / "autoselect.py").read_text()
    file.write_text(text.replace('ways[" gated"] = Way(gate=self._gate)', "pass"))
    with pytest.raises(RuntimeError, match="each .* passes, the file .*: test_the_gated_way_is"):
        main(["check", "autoselect", "--file", str(file)])
    assert {line[:4] for line in verdicts(capsys.readouterr().out).values()} == {"PASS"}


@pytest.mark.parametrize("words, says", [
    (["autoselect", "--only", "softmax"], "only=.'softmax'.: expected of hard_topk, Scorer, zs"),
    (["check", "autoselect", "--only", "softmax"], "only=.'softmax'.: expected of hard_topk"),
    (["autoselect", "--file", "{made}"], "mine.py is there: .* --overwrite, which loses"),
    (["autoselect", "--limit", "5"], "limit=5: writing does not read it"),
    (["check", "autoselect", "--file", "{made}", "--overwrite"], "check does not read it"),
    (["check", "autoselect", "--file", "{none}"], "none.py is not there: `python -m exercises"),
    (["check", "autoselect", "--file", "{made}"], "mine.py, line 2: invalid syntax"),
    (["check", "autoselect", "--file", "{bytes}"], "bytes.py is no Python file: .* decode"),
    (["toy_method"], "exercises/toy_method.toml is missing: expected a section"),
    (["nothing"], "method='nothing': expected one of autoselect")])
def test_a_mistake_is_said(words, says, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/toys"))
    places = {name: tmp_path / f"{name}.py" for name in ("none", "bytes")}
    places["made"] = tmp_path / "mine.py"
    places["made"].write_text("x = 1\nx x\n")
    places["bytes"].write_bytes(b"\xff\xfe")
    with pytest.raises((ValueError, OSError), match=says):
        main([word.format(**places) for word in words])
    assert places["made"].read_text() == "x = 1\nx x\n"


def test_overwrite_begins_anew(tmp_path):
    file = tmp_path / "mine.py"
    main(["autoselect", "--only", "zscore", "--file", str(file)])
    first = file.read_text()
    file.write_text("mine")
    main(["autoselect", "--only", "zscore", "--file", str(file), "--overwrite"])
    assert file.read_text() == first


@pytest.mark.parametrize("method", METHODS)
def test_every_equation_has_its_section_and_every_word_its_test(method):
    """Nothing in the file of hints is of an equation, or a test, that is no longer there."""
    every = exercises.equations(runs.load_method(method))
    about = tomllib.loads((ROOT / f"exercises/{method}.toml").read_text())
    assert [*about] == [equation.name for equation in every]
    tests = re.findall(r"^def (test_\w+)", (ROOT / f"tests/test_{method}.py").read_text(), re.M)
    for equation in every:
        for word in equation.tests:
            assert any(word in test for test in tests), f"{equation.name}: {word}"
