"""The version of the kernels is that of their code, whatever Python reads it."""

import tokenize

from nasbench.core import provenance


def test_an_f_string_of_one_token_or_of_several_is_the_same_code(monkeypatch):
    """Python 3.12 cuts f-strings into several tokens, 3.11 does not."""
    whole, read, cut = provenance.kernels_version(), tokenize.tokenize, 0

    def in_parts(readline):
        nonlocal cut
        for token in read(readline):
            if token.type == tokenize.STRING and token.string[:1] == "f":
                cut += 1
                yield token._replace(type=tokenize.OP, string=token.string[:4])
                yield token._replace(type=tokenize.OP, string=token.string[4:])
            else:
                yield token

    monkeypatch.setattr(provenance.tokenize, "tokenize", in_parts)
    assert provenance.kernels_version.__wrapped__() == whole
    assert cut or hasattr(tokenize, "FSTRING_START")
