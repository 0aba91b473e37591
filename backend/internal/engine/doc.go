// Package engine decides charges in Redis, in one script call a decision. Packages goredis and rueidis are
// thin clients of it:
//
//	store, err := engine.New(client, cluster, engine.Options{})
//	decision, err := store.Charge(ctx, charge)
//
// # The way of a charge
//
//  1. [Store.Charge] checks that the context has not ended and that the store is open, and finds the plan of
//     the charge's limit: the script, and the arguments that are the same for all charges to the limit.
//  2. The charge gets its target: the key in Redis and, where slots matter, the hash slot. Both are computed
//     once and carried. On a cluster a list over several slots, and where keys may be on several servers
//     (learn.go) a list over several hash tags, goes part by part from here on (split.go).
//  3. The charge enters the [Queue] of its server if that is known to be the only one, else of its slot. If the
//     queue has fewer than maxInFlight calls in flight, the charge goes alone. Otherwise it waits, and the
//     [Batcher] sends it with all other waiting charges as soon as a call ends.
//     Before it enters, its node must be ready (ready.go): connected, authenticated, and its slots known. That is one
//     attempt that all charges to the node share, under a time of its own. A charge whose context ends meanwhile is
//     not sent, and is no failure of the store; the attempt goes on. Once in the store's life the attempt also asks
//     the node whether it computes as the scripts need it (probe.go).
//  4. The call is encoded: for single.lua if a charge goes alone that has no request id, else for batch.lua. The numbers of a
//     driver.Moving are those for the time that the server's clock probably shows (moving.go); where it shows another, the
//     charges come back to this step, once.
//  5. The call is sent once: by the script's SHA if the node is known to have the script, else with its text. Only
//     if the node has forgotten the script, in which case nothing ran, is it sent again. A connection that breaks
//     makes the node not ready; a timeout has an attempt find out.
//  6. The script reads the server's time and the states of the keys, lets the kernels of the rules decide,
//     writes the new states, and replies with the time, the number of changes and the states as they were.
//  7. Go decides again on these states, with [driver.Apply]. So the reply is as short as possible and still
//     yields the whole decision, and a difference between a kernel and its Go is an error at once, by the
//     number of changes.
//  8. The callers of a batch wake up, each with its decision or error. An error of the whole call is shared,
//     see [driver.WithRoundTrip], so that a breaker counts it once.
//
// # Scripts
//
// A script is an assembly: prelude.lua, the clock, kernels of rules, and a driver. A charge alone, and a batch of one
// rule, has a script of its rule; other batches have one script of all rules that they use, see scripts. There are
// two drivers, and so two forms in which a charge travels. single.lua decides one charge and builds no table and no
// function but for rare states: it sets the latency of a store without load. batch.lua decides everything else: many
// single charges, and lists, of which a single charge with a request id is one. state.lua reads and writes states for both. load.lua and
// swap.lua serve algorithms without Lua, by compare-and-swap.
//
// A new field of a charge touches Charge.Request, single.go and single.lua, appendCharge and list.asked in batch.go, batch.lua,
// kernelParams in script.go, Fingerprint, SameCharge and the documentation of Scripted in quota/driver, and
// the Lua harness of package conformance.
//
// # Panics
//
// A panic of the client or an algorithm becomes an error of the calls that it concerns, see panic.go; that of a receiver of
// notices goes to slog.
//
// # Locks
//
// No lock is held across a round trip, no two at once, and none while a caller's function runs.
//
//   - Queue.mu guards a queue and its waiting batches: an item waits only while an event that sends it is
//     due.
//   - Store.mu guards the plans, and the table of nodes while it is replaced: a plan never changes.
//   - reach.mu guards the knowledge of the servers; scripts read it as an atomic value.
//   - slotQueues.mu guards the making of queues.
//   - readiness.mu guards the attempt at making a node ready. connections.mu guards a node's known scripts while
//     they are replaced.
//   - scripts.mu guards the texts: a rule has one kernel for the life of the store, and a script never
//     changes.
package engine
