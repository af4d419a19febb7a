"""``python -m l1ra``: what the doctor finds; the exit status is 1 if something has failed."""

import sys

from l1ra.reporting.doctor import doctor

if __name__ == "__main__":
    found = doctor()
    print(found)
    sys.exit(not found.ok)
