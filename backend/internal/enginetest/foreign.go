package enginetest

import (
	"errors"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Foreign: what the store did not write is ErrMisconfigured, and nothing is written: another program's
// value, another rule's state, a newer layout, a state that is cut off or out of range.
func Foreign(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	good := func(rule string, numbers ...int64) string {
		it := driver.Item{State: quota.State{Unit: numbers[0], A: numbers[1], B: numbers[2], Tail: numbers[3:]}}
		copy(it.Rule[:], rule)
		return packed(&it)
	}
	own := good("fw1", year.Microseconds(), 1, 1)
	values := map[string]string{
		"text":         "17",
		"json":         `{"tokens":1000}`,
		"byte":         "\x03",
		"zeros":        strings.Repeat("\x00", 25),
		"no name":      "\x00" + own[1:],
		"long name":    "\x09" + own[1:],
		"other rule":   good("tb1", 1, 1, 1_795_427_141_791_724),
		"newer layout": good("fw2", year.Microseconds(), 1, 1),
		"longer name":  good("fw10", year.Microseconds(), 1, 1),
		"record":       "id1:00:1:2:3",
		"name only":    own[:4],
		"half a unit":  own[:8],
		"no numbers":   own[:11],
		"one number":   own[:18],
		"cut":          own[:24],
		"one byte":     own + "\x00",
		"unit 0":       own[:4] + strings.Repeat("\x00", 7) + own[11:],
		"huge unit":    own[:4] + "\x7f" + strings.Repeat("\xff", 6) + own[11:],
		"huge A":       own[:11] + "\x20\x00\x00\x00\x00\x00\x01" + own[18:],
		"huge B":       own[:18] + "\x7f" + strings.Repeat("\xff", 6),
		"huge C":       own + "\x7f" + strings.Repeat("\xff", 6),
		"huge tail":    own + strings.Repeat("\x00", 7) + "\x7f" + strings.Repeat("\xff", 6),
		"long tail":    own + strings.Repeat("\x00", 7*(2+quota.MaxTail)),
	}
	fresh := quota.Charge{Limit: yearly("fresh", 10), Key: "k", Cost: 1}
	for _, hide := range []bool{false, true} {
		store, limit := open(engine.Options{}), yearly("n", 10)
		if hide {
			limit = limitOf("n", hidden{limit.Algorithm()})
		}
		c := quota.Charge{Limit: limit, Key: "k", Cost: 1}
		check := func(t *testing.T) {
			t.Helper()
			dump := server.Dump(bg, place(c)).Val()
			for _, op := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset} {
				c := c
				c.Op = op
				if d, err := store.Take(bg, c); !errors.Is(err, quota.ErrMisconfigured) {
					t.Errorf("hidden %v: %s decided %+v, %v", hide, op, d, err)
				}
				for _, list := range [][]quota.Charge{{c, fresh}, {fresh, c}} {
					if err := store.TakeAll(bg, list, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrMisconfigured) {
						t.Errorf("hidden %v: a list with %s: %v", hide, op, err)
					}
				}
				if server.Dump(bg, place(c)).Val() != dump || server.held(t, fresh) != "" {
					t.Fatalf("hidden %v: %s wrote", hide, op)
				}
			}
		}
		for name, value := range values {
			t.Run(name, func(t *testing.T) {
				server.FlushAll(bg)
				if err := server.Set(bg, place(c), value, 0).Err(); err != nil {
					t.Fatal(err)
				}
				check(t)
			})
		}
		t.Run("list", func(t *testing.T) {
			server.FlushAll(bg)
			if err := server.LPush(bg, place(c), "x").Err(); err != nil {
				t.Fatal(err)
			}
			check(t)
		})
	}
}
