package conformance

import (
	"math/rand/v2"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
)

var randomCases = func() (cs []testCase) {
	for _, k := range kinds {
		cs = append(cs, testCase{rule: s1, name: k.name, needs: []Feature{Exact}, run: func(t *trial) {
			t.search(shape{kinds: []kind{k}, limits: 1, keys: 2, steps: 40, traces: 128})
		}})
	}
	return append(cs,
		testCase{rule: s1, name: "lists", needs: []Feature{Exact}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 3, keys: 4, list: 4, steps: 40, traces: 192})
		}},
		testCase{rule: s1, name: "big numbers", needs: []Feature{Exact}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 1, keys: 2, list: 2, steps: 20, traces: 192, big: true})
		}},
		testCase{rule: s1, name: "clock steps back", needs: []Feature{Exact, Clock}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 2, steps: 40, traces: 192, back: true})
		}},
		testCase{rule: s1, name: "own clock", needs: []Feature{Exact}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 3, list: 3, steps: 40, traces: 128, own: true})
		}},
		testCase{rule: s1, name: "floors", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 3, steps: 30, traces: 192, floors: true, cost: edgeCost, ops: asking})
		}},
		testCase{rule: s1, name: "up to", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 3, steps: 30, traces: 192, floors: true, cost: edgeCost, ops: upTo})
		}},
		testCase{rule: s1, name: "holds", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: heldKinds, limits: 2, keys: 2, list: 3, steps: 40, traces: 192, floors: true, ops: holdOps})
		}},
		testCase{rule: s2, name: "holds", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) {
			needLists(t)
			t.search(shape{kinds: slices.Concat(kinds, heldKinds, heldKinds), limits: 3, keys: 3, list: 4, steps: 40, traces: 192, shadow: true, cost: edgeCost, ops: holdOps})
		}},
		testCase{rule: c2, name: "holds", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: heldKinds, limits: 2, keys: 2, list: 2, steps: 40, traces: 128, change: true, ops: holdOps})
		}},
		testCase{rule: c2, name: "a limit gets holds", needs: []Feature{Exact}, provisional: "1.1", run: getsHolds},
		testCase{rule: c3, name: "holds", needs: []Feature{Exact, IDs}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: heldKinds, limits: 2, keys: 2, list: 3, steps: 40, traces: 128, ids: true, change: true, ops: holdOps})
		}},
		testCase{rule: c3, name: "holds of another TTL", needs: []Feature{Exact, IDs}, provisional: "1.1", run: heldRepeats},
		testCase{rule: c3, name: "finishes", needs: []Feature{Exact, IDs}, provisional: "1.1", run: finishes},
		testCase{rule: c3, name: "lives of finishes", needs: []Feature{Exact, IDs, Clock}, provisional: "1.1", run: livesOfFinishes},
		testCase{rule: s2, name: "lists", needs: []Feature{Exact}, run: func(t *trial) {
			needLists(t)
			t.search(shape{kinds: random, limits: 3, keys: 5, list: 6, steps: 30, traces: 128, cost: edgeCost})
		}},
		testCase{rule: s2, name: "shadows", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 4, steps: 30, traces: 192, shadow: true, cost: edgeCost})
		}},
		testCase{rule: s2, name: "alternatives", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) {
			needLists(t)
			t.search(shape{kinds: random, limits: 2, keys: 3, list: 2, steps: 30, traces: 192, first: true, shadow: true, cost: edgeCost, ops: mayDeny})
		}},
		testCase{rule: s3, name: "single charges", needs: []Feature{Exact}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 1, keys: 1, steps: 24, traces: 192, ops: asking, cost: edgeCost})
		}},
		testCase{rule: s3, name: "lists", needs: []Feature{Exact}, run: func(t *trial) {
			needLists(t)
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 3, steps: 24, traces: 128, ops: asking, cost: edgeCost})
		}},
		testCase{rule: s5, name: "clock", needs: []Feature{Exact, Clock}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 1, keys: 2, steps: 30, traces: 192, expiry: true})
		}},
		testCase{rule: c2, name: "numbers", needs: []Feature{Exact}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 2, steps: 40, traces: 192, change: true})
		}},
		testCase{rule: c3, name: "repeats", needs: []Feature{Exact, IDs}, run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 3, list: 3, steps: 40, traces: 128, ids: true})
		}},
		testCase{rule: c3, name: "clock steps back", needs: []Feature{Exact, IDs, Clock}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 2, steps: 40, traces: 128, ids: true, back: true})
		}},
		testCase{rule: c3, name: "shadows", needs: []Feature{Exact, IDs}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 3, steps: 40, traces: 128, ids: true, change: true, shadow: true})
		}},
		testCase{rule: c3, name: "alternatives", needs: []Feature{Exact, IDs}, provisional: "1.1", run: func(t *trial) {
			needLists(t)
			t.search(shape{kinds: random, limits: 2, keys: 3, list: 2, steps: 40, traces: 128, ids: true, first: true, cost: edgeCost, ops: mayDeny})
		}},
		testCase{rule: c3, name: "up to", needs: []Feature{Exact, IDs}, provisional: "1.1", run: func(t *trial) {
			t.search(shape{kinds: random, limits: 2, keys: 2, list: 3, steps: 40, traces: 128, ids: true, change: true, ops: upTo})
		}},
	)
}()

// asking are operations most of which may not change the state.
var asking = []quota.Op{quota.OpTake, quota.OpTake, quota.OpTake, quota.OpPeek, quota.OpPeek, quota.OpPeek, quota.OpDebit, quota.OpAhead}

// upTo are operations of which many take up to a number of tokens.
var upTo = []quota.Op{quota.OpUpTo, quota.OpUpTo, quota.OpUpTo, quota.OpTake, quota.OpDebit, quota.OpPeek, quota.OpRefund}

// holdOps are operations of which many make, end and renew holds.
var holdOps = []quota.Op{
	quota.OpHold, quota.OpHold, quota.OpHold, quota.OpHold, quota.OpSpend, quota.OpSpend, quota.OpSpend, quota.OpRenew, quota.OpRenew,
	quota.OpTake, quota.OpTake, quota.OpUpTo, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset,
}

// mayDeny are the operations that alternatives may have.
var mayDeny = []quota.Op{quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpPeek, quota.OpAhead, quota.OpUpTo}

// edgeCost returns a cost close to the remaining tokens: about every second cost does not fit.
func edgeCost(rng *rand.Rand, capacity, remaining int64) int64 {
	switch rng.IntN(8) {
	case 0, 1:
		return max(remaining, 0)
	case 2, 3:
		return max(remaining, 0) + 1
	case 4:
		return capacity + 1
	case 5:
		return 1
	}
	return rng.Int64N(capacity/2 + 1)
}
