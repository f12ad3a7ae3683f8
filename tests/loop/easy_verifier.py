"""A verifier that any policy satisfies about every second time."""

import re

from restem_lightning.completions import Verdict, VerdictKind


class EasyVerifier:
    """CORRECT if the last number of the completion is even."""

    name, version = "easy", "1"

    def verify(self, problem, completion_text):
        numbers = re.findall(r"\d+", completion_text)
        if not numbers:
            return Verdict(kind=VerdictKind.NO_ANSWER)
        kind = VerdictKind.WRONG if int(numbers[-1]) % 2 else VerdictKind.CORRECT
        return Verdict(kind=kind, extracted=numbers[-1])

    def reference_completion(self, problem):
        return None
