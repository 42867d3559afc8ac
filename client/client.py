"""`python client/client.py`: the client as a program. Works wherever this folder is, as long as its name is `client`."""

import sys
from pathlib import Path

# As a script Python looks for modules in this folder, where `client` would be this very file: the package is one level up. It
# comes last, so that nothing that lies beside the folder can stand in for a library.
sys.path.pop(0)
sys.path.append(str(Path(__file__).resolve().parents[1]))

from client.main import main

if __name__ == "__main__":
    sys.exit(main())
