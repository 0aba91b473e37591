package driver_test

import (
	"context"
	"testing"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// reporter is a store with every optional interface.
type reporter struct {
	quota.Store
	atomicity driver.Atomicity
	prompt    bool
}

func (r reporter) Atomicity() driver.Atomicity { return r.atomicity }
func (r reporter) Prompt() bool                { return r.prompt }
func (r reporter) Node(c quota.Charge) string  { return "node of " + c.Key }
func (r reporter) Refresh(context.Context) error {
	return nil
}
func (r reporter) Health(context.Context) (driver.Health, error) {
	return driver.Health{Version: "7.0.15"}, nil
}

// plain is a store without optional interfaces, and around another store where inner is set.
type plain struct{ quota.Store }

type wrapper struct{ plain }

func (w wrapper) Unwrap() quota.Store { return w.Store }

func TestFind(t *testing.T) {
	all := reporter{Store: local.New(), atomicity: driver.OneKey, prompt: true}
	for _, test := range []struct {
		name  string
		store quota.Store
		found bool
		prompt
		atomicity driver.Atomicity
	}{
		{"the store itself", all, true, true, driver.OneKey},
		{"through wrappers", wrapper{plain{wrapper{plain{all}}}}, true, true, driver.OneKey},
		{"behind a store that does not unwrap", plain{all}, false, false, driver.AnyKeys},
		{"nearest first", reporter{Store: all}, true, false, driver.AnyKeys},
		{"absent", wrapper{plain{plain{nil}}}, false, false, driver.AnyKeys},
		{"a wrapper of no store", wrapper{}, false, false, driver.AnyKeys},
		{"no store", nil, false, false, driver.AnyKeys},
	} {
		r, ok := driver.Find[driver.HealthReporter](test.store)
		if ok != test.found {
			t.Errorf("%s: found a HealthReporter: got %v, want %v", test.name, ok, test.found)
		}
		if ok {
			if h, err := r.Health(t.Context()); h.Version != "7.0.15" || err != nil {
				t.Errorf("%s: Health: got %+v, %v, want version 7.0.15", test.name, h, err)
			}
		}
		p, ok := driver.Find[driver.Placed](test.store)
		if ok != test.found {
			t.Errorf("%s: found a Placed: got %v, want %v", test.name, ok, test.found)
		}
		if ok {
			if got, want := p.Node(quota.Charge{Key: "a"}), "node of a"; got != want {
				t.Errorf("%s: Node: got %q, want %q", test.name, got, want)
			}
		}
		if got := driver.IsPrompt(test.store); got != bool(test.prompt) {
			t.Errorf("%s: IsPrompt: got %v, want %v", test.name, got, test.prompt)
		}
		if got := driver.AtomicityOf(test.store); got != test.atomicity {
			t.Errorf("%s: AtomicityOf: got %v, want %v", test.name, got, test.atomicity)
		}
	}
}

type prompt bool
