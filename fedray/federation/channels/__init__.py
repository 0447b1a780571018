"""How clients' work reaches the server, and under which guarantee: one file a guarantee, with the server's half, the
client's half, the check of its config, and its lines of `privacy.json`.

| file      | guarantee                                           | who adds the noise, where                    |
|-----------|-----------------------------------------------------|----------------------------------------------|
| `plain`   | none: each update comes as it is                    | nobody                                       |
| `example` | each training example is protected, whoever looks   | each client: `ExampleSide.protect`           |
| `client`  | each client, against whoever sees the models        | the coordinator: `ClientLevel.collect`       |

A guarantee stands over a carrier, which is how vectors travel: as they are (`plain.AsIs`), or in secure sums
(`secure.SecureSums`), of which the coordinator sees the total alone, and beside it what each client says of its round.
`base` has the protocols, `accounted` what the two private guarantees share (the ledger), `orders` a client's own look
at what it is told, `statement` the lines of `privacy.json`; `registry` puts a config's channel together.
"""
