package conformance

import (
	"errors"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

var clockCases = []testCase{
	{rule: c5, name: "clocks that differ", needs: []Feature{Exact, Clock, Shared}, provisional: "1.1", run: clocksThatDiffer},
}

// clocksThatDiffer takes all it can by two handles in turn, of which one's clock is ahead of the other's. A clock that is ahead
// brings tokens back once, and not each time that its turn comes.
func clocksThatDiffer(t *trial) {
	if !t.lacks(ServerClock) {
		t.excusef("the store goes by its server's clock")
	}
	const capacity = 200 // and as many a second
	for _, ahead := range []time.Duration{300 * time.Millisecond, 999 * time.Millisecond, 1500 * time.Millisecond, time.Minute} {
		for _, k := range []kind{tokenBucket, slidingWindow, slidingLog} {
			l := t.named("tokens", k, numbers{capacity, capacity, time.Second})
			one, two := newClock(), newClock()
			two.add(ahead)
			data := t.data()
			hs := []*handle{t.open(Opening{Data: data, Clock: one.time}), t.open(Opening{Data: data, Clock: two.time})}
			granted := int64(0)
			for turn := range 16 {
				for range 20 {
					c := quota.Charge{Limit: l, Key: "k", Cost: 20}
					if ahead > time.Second {
						if _, err := hs[turn%2].take(bg, quota.Charge{Limit: l, Key: "k", Op: quota.OpPeek}); errors.Is(err, quota.ErrMisconfigured) {
							break // the store refuses clocks that differ so much
						}
					}
					ds, unknown := t.persist(hs[turn%2], false, c)
					if unknown {
						t.skipf("not judged, because the store does not answer")
					}
					if !ds[0].Allowed {
						break
					}
					granted += c.Cost
				}
			}
			most := int64(capacity + min(capacity, capacity*ahead/time.Second))
			if granted > most {
				t.fatalf("got: %d tokens were granted of %s by two handles in turn, one with a clock that is %v ahead of the other's; want: at most %d, of which the clock that is ahead brought some back once",
					granted, t.describe(l), ahead, most)
			}
		}
	}
}
