"""Campaigns of faults: runs that are killed, stopped, without room or resumed from hostile files.

A test here counts its trials, and reports all that did not hold.
"""

import pytest

pytest.register_assert_rewrite("faults.campaign")
