package conformance

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Version is the version of the suite. A rule or case that is new in a minor version is provisional until
// the next one: its failures are reported and do not fail the test.
const Version = "1.0"

// Harness says how the suite gets at a backend. Only Open is required; the zero value of the rest claims
// that the backend keeps every rule.
type Harness struct {
	// Name is what reports call the backend, such as "goredis on a cluster"; "" is the name of the test.
	Name string
	// Open returns a new handle on the data called o.Data, which is empty when it is first opened. Two
	// handles on one name share state, as two processes would; other names share nothing. It ends the test
	// with t.Fatal if it cannot. What must be cleaned up beside the store goes to t.Cleanup; the suite closes
	// the store. It is called concurrently, some hundred times in a run.
	Open func(t testing.TB, o Opening) quota.Store
	// Lacks lists what the backend does not do.
	Lacks []Lack
	// Exempt lists rules and cases that the backend is not tested for.
	Exempt []Exemption
	// Fault opens a handle as Open does, through a connection that can be broken, and returns the function
	// that breaks it: from then on every call to the server meets the fault, until the next call of set.
	// set is called while calls are under way. nil: faults are not tested.
	Fault func(t testing.TB, o Opening) (s quota.Store, set func(Fault))
}

// Opening is what Harness.Open is to open.
type Opening struct {
	// Data is the name of the data: 20 letters and digits, new in every run.
	Data string
	// Clock, where it is not nil, is the store's time, expiry included. It may be called from any
	// goroutine. nil is the store's own clock.
	Clock func() time.Time
}

// Feature is something that a backend may lack.
type Feature string

const (
	// Clock: Open heeds Opening.Clock. Without it the suite waits for real time, and for less of it.
	Clock Feature = "clock"
	// Shared: a second handle on the same data shares its state.
	Shared Feature = "shared"
	// Exact: verdicts are those of the kernels. A store that decides on bounds, such as one that leases
	// quota, lacks it, and is tested for admitting no more than there is, and something.
	Exact Feature = "exact"
	// IDs: request ids are remembered. A store without it refuses them with quota.ErrCrossSlot.
	IDs Feature = "ids"
)

var features = []Feature{Clock, Shared, Exact, IDs}

// Lack says that a backend has not got a feature, and why. The reason is printed with every case that is
// skipped for it.
type Lack struct {
	Feature Feature
	Reason  string
}

// Exemption takes a rule, such as "S5", or one case of it, such as "S5_Forgetting/windows", out of the run.
// The reason, such as the address of an issue, is printed.
type Exemption struct {
	Rule   string
	Reason string
}

// Fault is what goes wrong between a store and its server.
type Fault uint8

const (
	// NoFault: nothing goes wrong.
	NoFault Fault = iota
	// Refused: the server does not get the request, and the store learns that something is wrong.
	Refused
	// LostReply: the server executes the request, and the store learns that something is wrong instead of
	// the reply.
	LostReply
	// Frozen: the server answers nothing until the fault ends; what it was sent it may execute then.
	Frozen
)

var faultNames = [...]string{"no fault", "refused", "lost reply", "frozen"}

// String returns the fault's name in lower case.
func (f Fault) String() string {
	if int(f) < len(faultNames) {
		return faultNames[f]
	}
	return "unknown"
}

// check returns an error unless the suite can work with the harness.
func (h *Harness) check() error {
	if h.Open == nil {
		return fmt.Errorf("conformance: Harness.Open is nil; accepted: a function that opens the store")
	}
	for _, l := range h.Lacks {
		known := false
		for _, f := range features {
			known = known || f == l.Feature
		}
		if !known || l.Reason == "" {
			return fmt.Errorf("conformance: Harness.Lacks has %+v; accepted: one of %v, with a reason", l, features)
		}
	}
	for _, e := range h.Exempt {
		known := false
		for _, c := range cases() {
			known = known || c.named(e.Rule)
		}
		if !known || e.Reason == "" {
			return fmt.Errorf("conformance: Harness.Exempt has %+v; accepted: a rule such as S5 or a case such as %s, with a reason", e, cases()[0].path())
		}
	}
	return nil
}

// lacks returns why the backend has not got a feature, or "".
func (h *Harness) lacks(f Feature) string {
	for _, l := range h.Lacks {
		if l.Feature == f {
			return l.Reason
		}
	}
	return ""
}

// exempt returns why a case is not tested, or "".
func (h *Harness) exempt(c *testCase) string {
	for _, e := range h.Exempt {
		if c.named(e.Rule) {
			return e.Reason
		}
	}
	return ""
}

// named reports whether name means the case: its rule's id or name, or its path.
func (c *testCase) named(name string) bool {
	return name == c.rule.id || name == c.rule.id+"_"+c.rule.name || name == c.path()
}

func (c *testCase) path() string {
	return c.rule.id + "_" + c.rule.name + "/" + strings.ReplaceAll(c.name, " ", "_")
}
