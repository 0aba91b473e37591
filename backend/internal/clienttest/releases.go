package clienttest

import (
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm/testdata/previous"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// releases: this release and the previous one take turns on the same keys of one server. Each decides on the other's
// states as its own Go does, for single charges and for lists.
func releases(t *testing.T, l library) {
	_, open := l.single(t)
	stores := [2]store{open(engine.Options{}), open(engine.Options{})}
	rng := rand.New(rand.NewPCG(seed(t), 0))
	for round := range sized(20, 400) {
		rules := []quota.Algorithm{
			newRule(bucket, 1+rng.Int64N(100), 1+rng.Int64N(100), time.Second),
			newRule(sliding, 1+rng.Int64N(100), 0, 20*time.Millisecond),
		}
		for k, rule := range rules {
			name := [...]string{"bucket", "sliding"}[k] + strconv.Itoa(round)
			limits := [2]*quota.Limit{limitOf(name, rule), limitOf(name, previous.Of(rule))}
			var want driver.Item
			var receipt quota.Decision
			for step := range 40 {
				release := rng.IntN(2)
				c := quota.Charge{Limit: limits[release], Key: "key", Cost: 1 + rng.Int64N(rule.Spec().Capacity)}
				switch rng.IntN(5) {
				case 0:
					c = c.Refund(receipt, receipt.Charged)
				case 1:
					c.Op = quota.OpDebit
				}
				out := make([]quota.Decision, 1)
				cs := []quota.Charge{c}
				if rng.IntN(2) == 0 { // a list has a script of its own
					out, cs = append(out, quota.Decision{}), append(cs, quota.Charge{Limit: limitOf("other", rules[0]), Key: "key", Op: quota.OpPeek})
				}
				ok(t, stores[release].ChargeAll(bg, cs, out))
				var d quota.Decision
				ok(t, driver.ApplyOne(&c, &want, out[0].At, &d))
				if out[0] != d {
					t.Fatalf("%s, step %d, release %d: %v: got %v, want %v", name, step, release, c, out[0], d)
				}
				if d.Allowed && c.Op != quota.OpRefund {
					receipt = d
				}
			}
		}
	}
}
