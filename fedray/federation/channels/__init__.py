"""How clients' work reaches the server, and under which guarantee: one file a guarantee, with the server's half, the
client's half, the check of its config, and its lines of `privacy.json`.

| file       | guarantee                                                        | who adds the noise |
|------------|------------------------------------------------------------------|--------------------|
| `plain`    | none: each update comes as it is                                 | nobody             |
| `example`  | each training example is protected, whoever looks                | each client        |
| `client`   | each client is protected, against whoever sees the models        | the coordinator    |
| `secure`   | the coordinator sees only sums; goes with each of the three      | nobody             |

A channel is a guarantee (`plain`, `example` or `client`) over a carrier, which is how vectors travel: as they are
(`plain.AsIs`), or in secure sums (`secure.SecureSums`). `registry` puts them together.
"""
