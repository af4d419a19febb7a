"""``python -m l1ra``: run ``l1ra.doctor()`` and print its diagnosis. The exit status is 1 if a check has failed."""

import sys

from l1ra.reporting.doctor import doctor

if __name__ == "__main__":
    diagnosis = doctor()
    print(diagnosis)
    sys.exit(not diagnosis.ok)
