"""plumbing/complaints.py: what servers mean by their refusals, in words of our own."""
import pytest

from plumbing.complaints import (codes_of, complaint_of, error_of, fields_not_taken, hint_of, is_moderation,
                               is_success, may_pass)


@pytest.mark.parametrize("answer, text, error", [
    ({"error": {"message": "no", "code": "c"}}, "raw", ("no", "c")),
    ({"error": {"message": "no", "type": "t", "code": None}}, "raw", ("no", "t")),
    ({"error": "no"}, "raw", ("raw", None)),
    ({"detail": "no"}, "raw", ("raw", None)),
    ([], "raw", ("raw", None)),
    (None, "<html>", ("<html>", None)),
])
def test_the_error_in_an_answer(answer, text, error):
    assert error_of(answer, text) == error


def test_codes_wherever_they_stand():
    assert codes_of({"code": "Data_Inspection-Failed"}) == {"datainspectionfailed"}
    nested = {"type": "a", "innererror": {"code": "b"}, "metadata": {"code": 7}}
    assert codes_of({"error": nested}) == {"a", "b"}
    assert codes_of([1]) == codes_of(None) == codes_of({"error": "x"}) == set()
    error = {"error": {"code": "unsupported_value", "param": "top_p", "message": "m"}}
    assert complaint_of(error, "m") == "unsupported_value top_p m" and complaint_of(None, "m") == "m"


@pytest.mark.parametrize("status, passes", [(408, True), (429, True), (498, True), (499, True), (500, True),
                                            (502, True), (521, True), (523, True), (525, True), (527, True),
                                            (530, True), (598, True), (501, False),
                                            (505, False), (400, False), (404, False), (302, False), (600, False), (0, False)])
def test_what_may_pass(status, passes):
    assert may_pass(status) == passes


def test_every_2xx_is_success():
    assert all(map(is_success, (200, 201, 202, 206))) and not any(map(is_success, (199, 302, None, 0)))


@pytest.mark.parametrize("status, answer, text, moderated", [
    (400, {"error": {"code": "data_inspection_failed"}}, "", True),
    (400, {"code": "DataInspectionFailed"}, "", True),
    (400, {"error": {"code": "content_filter"}}, "", True),
    (400, {"error": {"code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, "", True),
    (403, None, "this model requires moderation: your input was flagged for violence", True),
    (400, None, "the text goes against our content policy", True),
    (400, None, "the prompt holds sensitive words", True),
    (403, None, "your account was flagged", False),
    (403, None, "this key may not use the model", False),
    (400, None, "max_tokens is not supported", False),
    (400, None, "temperature must be below 2", False),
    (500, {"error": {"code": "content_filter"}}, "", False),
])
def test_moderation_is_known(status, answer, text, moderated):
    assert is_moderation(status, codes_of(answer), text) == moderated


BODY = {"max_tokens": 100, "temperature": 0.7, "top_p": 0.9, "response_format": {}}
TWO = "temperature and top_p can't both be given"


@pytest.mark.parametrize("text, change, fields", [
    ("max_tokens is not supported here, use max_completion_tokens", {}, {"max_tokens"}),
    ("max_tokens is too large: 100; at most 50 are supported", {}, set()),
    ("max_tokens must be less than 50", {}, set()),
    ("does not support more than 50 max_tokens", {}, set()),
    ("unsupported_value temperature only the default is supported", {}, {"temperature"}),
    ("temperature must lie in the range 0 to 0.5", {}, set()),
    ("a text on the temperature of stars was blocked", {}, set()),
    ("a text on the temperature of stars was blocked", {"temperature": 1.0}, {"temperature"}),    # free
    ("`top_p` must be > 0.0 and < 1.0", {"top_p": 1.0}, {"top_p"}),
    ("`top_p` must be > 0.0 and < 1.0", {}, set()),
    ("json_object mode is not available", {}, {"response_format"}),
    ("Extra inputs are not permitted: response_format", {}, {"response_format"}),
    ("temperature, top_p: unknown fields", {}, {"temperature", "top_p"}),
    (TWO, {}, {"top_p"}),
    (TWO, {"temperature": 1.0}, {"temperature"}),  # the user has set the other
    (TWO, {"top_p": 1.0}, {"top_p"}),
    (TWO, {"temperature": 1.0, "top_p": 1.0}, {"top_p"}),
])
def test_which_field_is_left_out(text, change, fields):
    assert fields_not_taken(400, text, BODY | change) == fields_not_taken(422, text, BODY | change) == fields
    assert fields_not_taken(404, text, BODY | change) == set()
    assert fields_not_taken(400, text, {}) == set()


@pytest.mark.parametrize("status, text, words", [
    (422, "inputs and max_new_tokens must be <= 2048", "--max-answer-tokens"),
    (400, "the maximum context length is 2048", "--max-answer-tokens"),
    (422, "`temperature` must be strictly positive", "--temperature"),
    (422, "`top_p` must be < 1.0", "--top-p"),
    (422, "grammar is not supported", "--no-json-mode"),
    (401, "no", "OPENAI_API_KEY"),
    (400, "no", "no retry"),
])
def test_a_refusal_names_the_flag_that_mends_it(status, text, words):
    assert words in hint_of(status, text)
