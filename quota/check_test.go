package quota_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// badCharges are lists that no store may see.
func badCharges() map[string]struct {
	charges []quota.Charge
	names   []string // parts of the error's text
	err     error
} {
	a, b := testkit.Bucket("a", 10, time.Second), testkit.Bucket("b", 10, time.Second)
	another := testkit.Bucket("a", 20, time.Second)
	many := make([]quota.Charge, quota.MaxCharges+1)
	for i := range many {
		many[i] = quota.Charge{Limit: a, Key: fmt.Sprint("k", i)}
	}
	type bad = struct {
		charges []quota.Charge
		names   []string
		err     error
	}
	one := func(c quota.Charge, names ...string) bad { return bad{[]quota.Charge{c}, names, quota.ErrInvalid} }
	two := func(c, d quota.Charge, err error, names ...string) bad { return bad{[]quota.Charge{c, d}, names, err} }
	k := quota.Charge{Limit: a, Key: "k"}
	return map[string]bad{
		"none":             {nil, []string{"number of charges", "0", "1 to 64"}, quota.ErrInvalid},
		"65":               {many, []string{"number of charges", "65", "1 to 64"}, quota.ErrInvalid},
		"unmade limit":     one(quota.Charge{Limit: new(quota.Limit), Key: "k"}, "limit", "NewLimit"),
		"empty key":        one(quota.Charge{Limit: a}, "key", `""`),
		"no limit, no key": one(quota.Charge{}, "key", `""`),
		"bad key":          one(quota.Charge{Limit: a, Key: "x//y"}, "key", `"x//y"`, "1 to 512"),
		"long key":         one(quota.Charge{Limit: a, Key: strings.Repeat("x", 513)}, "key", "xxx"),
		"key not UTF-8":    one(quota.Charge{Limit: a, Key: "a\xff"}, "key", `\xff`),
		"negative cost":    one(quota.Charge{Limit: a, Key: "k", Cost: -1}, "cost", "-1", "0 or more"),
		"negative time":    one(quota.Charge{Limit: a, Key: "k", Op: quota.OpRefund, MadeAt: -1}, "time", "-1", "Decision.At"),
		"unknown op":       one(quota.Charge{Limit: a, Key: "k", Op: 7}, "operation", "OpTake"),
		"op 255":           one(quota.Charge{Limit: a, Key: "k", Op: 255}, "operation", "OpTake"),
		"long id":          one(quota.Charge{Limit: a, Key: "k", ID: strings.Repeat("i", 129)}, "request id", "128"),
		"id not UTF-8":     one(quota.Charge{Limit: a, Key: "k", ID: "\xff"}, "request id", `\xff`),
		"twice":            two(k, k, quota.ErrInvalid, "limit a", `"k"`, "once"),
		"twice by name":    two(k, quota.Charge{Limit: another, Key: "k", Op: quota.OpPeek}, quota.ErrInvalid, "limit a", `"k"`, "once"),
		"second is bad":    two(k, quota.Charge{Limit: b, Key: "k", Cost: -7}, quota.ErrInvalid, "cost", "-7"),
		"two ids":          two(quota.Charge{Limit: a, Key: "k", ID: "1"}, quota.Charge{Limit: b, Key: "k", ID: "2"}, quota.ErrInvalid, "request id", `"2"`),
		"id on the first":  two(quota.Charge{Limit: a, Key: "k", ID: "1"}, quota.Charge{Limit: b, Key: "k"}, quota.ErrInvalid, "request id"),
		"id on the second": two(k, quota.Charge{Limit: b, Key: "k", ID: "2"}, quota.ErrInvalid, "request id"),
		"id over groups":   two(quota.Charge{Limit: a, Key: "g/k", ID: "1"}, quota.Charge{Limit: b, Key: "h/k", ID: "1"}, quota.ErrCrossSlot, "one group"),
	}
}

func TestCheckRefuses(t *testing.T) {
	for name, bad := range badCharges() {
		t.Run(name, func(t *testing.T) {
			check := func(call string, err error) {
				t.Helper()
				if !errors.Is(err, bad.err) {
					t.Fatalf("%s: got %v, want %v", call, err, bad.err)
				}
				for _, n := range bad.names {
					if !strings.Contains(err.Error(), n) {
						t.Errorf("%s: got %q, want an error that names %q", call, err, n)
					}
				}
			}
			if name != "no limit, no key" {
				check("Check", quota.Check(bad.charges))
			}
			r := &recorder{}
			_, err := newLimiter(t, r, testkit.Bucket("a", 10, time.Second), nil).ChargeAll(bg, bad.charges...)
			check("ChargeAll", err)
			if len(r.calls) > 0 {
				t.Errorf("calls of the store: got %v, want none", r.calls)
			}
		})
	}
	testkit.WantInvalid(t, quota.Check([]quota.Charge{{Key: "k"}}), "limit", "nil", "NewLimit")
}

func TestCheckAccepts(t *testing.T) {
	a, b := testkit.Bucket("a", 10, time.Second), testkit.Bucket("b", 10, time.Second)
	most := make([]quota.Charge, quota.MaxCharges)
	for i := range most {
		most[i] = quota.Charge{Limit: a, Key: fmt.Sprint("g/", i), ID: strings.Repeat("i", 128), Cost: 1<<63 - 1}
	}
	for name, cs := range map[string][]quota.Charge{
		"64 with one id":           most,
		"two limits, one key":      {{Limit: a, Key: "k"}, {Limit: b, Key: "k"}},
		"one limit, two keys":      {{Limit: a, Key: "k"}, {Limit: a, Key: "l"}},
		"two groups without an id": {{Limit: a, Key: "g/k"}, {Limit: a, Key: "h/k"}},
		"every operation": {{Limit: a, Key: "0"}, {Limit: a, Key: "1", Op: quota.OpPeek}, {Limit: a, Key: "2", Op: quota.OpDebit},
			{Limit: a, Key: "3", Op: quota.OpRefund, MadeAt: 5}, {Limit: a, Key: "4", Op: quota.OpReset}},
	} {
		if err := quota.Check(cs); err != nil {
			t.Errorf("Check of %s: got %v, want nil", name, err)
		}
	}
}
