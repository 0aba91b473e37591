package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

func TestGateway(t *testing.T) {
	store := quotatest.New(t, nil)
	g, err := open(t.Context(), fleetquota.Config{Store: store})
	if err != nil {
		t.Fatal(err)
	}
	defer g.limiter.Close()
	limits := (*g.tenants.Load())["guest"]
	answer := func(want string) {
		t.Helper()
		err := g.answer(t.Context(), "guest", 500, func() int64 { return 300 })
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("answer: got %v, want an error with %q", err, want)
		}
	}
	for range 4 {
		answer("")
	}
	answer("requests: 4/1m sliding")
	store.WantCharged(limits[0], "guest/model", 1200)
	store.WantCharged(limits[1], "guest/model", 4)
	store.WantCharged(limits[2], "guest", 1200)

	store.Advance(2 * time.Minute)
	store.Fail(quota.ErrUnavailable)
	if err := g.answer(t.Context(), "guest", 500, func() int64 { return 0 }); !errors.Is(err, quota.ErrUnavailable) {
		t.Errorf("answer in an outage: got %v, want ErrUnavailable", err)
	}
	store.Fail(nil)

	// Wrong plans leave those in force as they are, and new ones are in force at once.
	if err := g.load(strings.Replace(plans, "4/1m sliding", "4/1x sliding", 1)); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), `"1x"`) {
		t.Errorf("load of a wrong plan: got %v, want ErrInvalid with the span", err)
	}
	answer("")
	if err := g.load(strings.Replace(plans, "2000 burst 2000/m", "100 burst 100/m", 1)); err != nil {
		t.Error(err)
	}
	answer("tokens: 100 burst 100/m bucket")

	want := map[string]int{"granted": 5, "settled": 5, "failed": 1, "denied by requests": 1, "denied by tokens": 1}
	for outcome, n := range want {
		if g.outcomes[outcome] != n {
			t.Errorf("calls %s: got %d, want %d; all: %v", outcome, g.outcomes[outcome], n, g.outcomes)
		}
	}
}
