"""The config: one frozen, validated, serialisable value for everything that runs.

`sections`: types and docs. `declared`: fields that methods and adapters declare. `checks`: what does
not go together. `read`: from YAML, flags or plain values. `build`: the method and adapter values that a config means.
What can only be known from the model or the data is checked by `fedray.federation.prepare`, before anything is
touched.
"""
