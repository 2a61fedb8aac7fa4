"""Where the models of the tests are: `pytest --device cuda` changes it."""

chosen = "cpu"
