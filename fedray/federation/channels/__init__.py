"""How clients' work reaches the server, and under which guarantee: one file a guarantee, with the server's half, the
client's half, the check of its config, and its lines of `privacy.json`.

| file      | guarantee                                           | who adds the noise, where                    |
|-----------|-----------------------------------------------------|----------------------------------------------|
| `plain`   | none: each update comes as it is                    | nobody                                       |
| `example` | each training example is protected, whoever looks   | each client: `ExampleSide.protect`           |
| `client`  | each client, against whoever sees the models        | the coordinator: `ClientLevel.collect`       |
| `distributed` | each client, against everyone else              | each client its share: `DistributedSide.send` |

A guarantee stands over a carrier, which is how vectors travel: as they are (`plain.AsIs`), or in secure sums
(`secure.SecureSums`), of which the coordinator sees the total alone, and beside it what each client says of its round.
`base` has the protocols, `accounted` what the private guarantees share (the ledger), `keyed` what those share whose
noise is from the clients' own keys, `orders` a client's own look at what it is told, `masked` the client's half of
secure sums, `fixed_masks` what a test's word makes of them, `statement` the lines of `privacy.json`, `threats` who
learns what; `registry` puts a config's channel together.
"""
