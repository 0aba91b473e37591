package conformance

import (
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var panicCases = []testCase{
	{rule: s4, name: "panics", run: panics},
}

// panicky is a tally that panics instead of a verdict on a take.
type panicky struct{ tally }

func (p panicky) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	if r.Op == quota.OpTake {
		panic("a fault in an algorithm")
	}
	return p.tally.Decide(s, r, now)
}

// panics makes calls in which an algorithm panics. The panic may reach the caller or become an error, and nothing is charged
// by the call; later calls, on the same keys too, are answered as if it had never been made.
func panics(t *trial) {
	h := t.open(Opening{})
	l := t.named("tally", goOnly, numbers{limit: 10})
	bad := quota.Must(quota.NewLimit(l.Name(), panicky{tally{10}}))
	used := map[string]int64{}
	take := func(key string) {
		ds, _ := t.persist(h, false, quota.Charge{Limit: l, Key: key, Cost: 1})
		used[key]++
		if want := 10 - used[key]; len(ds) != 1 || !ds[0].Allowed || ds[0].Remaining != want {
			t.fatalf("take of 1 on %q after calls in which the algorithm panicked: got %v, want it allowed, with %d left", key, ds, want)
		}
	}
	take("g/a")
	take("g/b")
	for range 3 {
		if d, err := h.take(bg, quota.Charge{Limit: bad, Key: "g/a", Cost: 1}); err == nil {
			t.fatalf("take in which the algorithm panics: got %v, want the panic or an error", d)
		}
		take("g/a")
		if driver.AtomicityOf(h.store) == driver.OneKey {
			continue
		}
		if ds, err := h.takeAll(bg, quota.Charge{Limit: l, Key: "g/b", Cost: 1}, quota.Charge{Limit: bad, Key: "g/a", Cost: 1}); err == nil {
			t.fatalf("list in which the algorithm panics: got %v, want the panic or an error", ds)
		}
		take("g/b")
	}
}
