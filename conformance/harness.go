package conformance

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Version is the version of the suite. A rule or case that is new in a minor version is provisional until
// the next one: its failures are reported and do not fail the test.
const Version = "1.1"

// Harness tells the suite how to open a backend. Only Open is required; the zero value of the other fields claims that
// the backend keeps every rule.
type Harness struct {
	// Name is the backend's name in reports, such as "goredis on a cluster"; "" stands for the name of the test.
	Name string
	// Open returns a new handle on the data called o.Data, which is empty when it is first opened. Two handles on one
	// name must share state, as two processes would; handles on different names must not. Open ends the test with
	// t.Fatal if it cannot open the store. The suite closes the store; Open hands every other clean-up to t.Cleanup.
	// It is called concurrently, some hundred times in a run.
	Open func(t testing.TB, o Opening) quota.Store
	// Lacks lists the features that the backend does not have.
	Lacks []Lack
	// Exempt lists rules and cases that the backend is not tested for.
	Exempt []Exemption
	// Fault opens a handle as Open does, through a connection that can be broken, and returns the function that breaks
	// it: after set(f) every request to the server must meet the fault f, until the next call of set. Under LostReply
	// requests that charge nothing may be answered, and the one that charges must be executed: a store of several round
	// trips that never gets to its commit shows nothing. The suite calls set while calls to the store are under way, and
	// while the store asks a limit's algorithm. FaultyKV, FaultyStore and Proxy have such functions. If Fault is nil, faults
	// are not tested, and the last line of the test says so.
	Fault func(t testing.TB, o Opening) (s quota.Store, set func(Fault))
	// Process, unless it is nil, has the suite open second handles in another process. It gets the command that runs the
	// test binary again, with this test alone: Run finds there that it is not to test but to open stores, with Open, and to
	// decide for the suite. Process adds settings to the command's environment by which the test reaches the same server, such as
	// the address of one that it started; it may replace the command by another that runs the test, on another machine too.
	// If Process is nil, charges by several processes are not tested.
	Process func(cmd *exec.Cmd)
}

// Opening describes the store that Harness.Open must open.
type Opening struct {
	// Data is the name of the data: 20 letters and digits, new in every run.
	Data string
	// Clock, unless it is nil, is the clock that the store must use, for expiry too. It may be called from any
	// goroutine. nil stands for the store's own clock.
	Clock func() time.Time
}

// Feature is a capability that a backend may lack.
type Feature string

const (
	// Clock: Open uses Opening.Clock. Without it the suite waits in real time, for shorter spans.
	Clock Feature = "clock"
	// Shared: a second handle on the same data shares its state.
	Shared Feature = "shared"
	// Exact: verdicts are those of the kernels. A store that decides on bounds, such as a store that leases quota, lacks
	// it; the suite then tests that the store admits some charges, and no more than the limit allows.
	Exact Feature = "exact"
	// IDs: request ids are remembered. A store without this feature must refuse ids with quota.ErrCrossSlot.
	IDs Feature = "ids"
	// ServerClock: the time of decisions is the server's. A store that goes by the clocks of its clients lacks it; the suite
	// then bounds the tokens that it admits where these differ.
	ServerClock Feature = "server clock"
)

var features = []Feature{Clock, Shared, Exact, IDs, ServerClock}

// Lack declares that a backend lacks a feature, and why. The reason is printed with every case that is skipped for it.
type Lack struct {
	Feature Feature
	Reason  string
}

// Exemption takes a rule, such as "S5", or one case of it, such as "S5_Forgetting/clock", out of the run.
// The reason, such as the address of an issue, is printed.
type Exemption struct {
	Rule   string
	Reason string
}

// Fault is a failure of the connection between a store and its server.
type Fault uint8

const (
	// NoFault: the connection works.
	NoFault Fault = iota
	// Refused: the server does not get the request, and the store gets an error.
	Refused
	// LostReply: the server executes the request, and the store gets an error instead of the reply.
	LostReply
	// Frozen: the server sends no reply until the fault ends; then it may execute the requests that it received.
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

// check returns an error if the harness is not complete, or names unknown features or rules.
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

// lacks returns the reason why the backend lacks a feature, or "".
func (h *Harness) lacks(f Feature) string {
	for _, l := range h.Lacks {
		if l.Feature == f {
			return l.Reason
		}
	}
	return ""
}

// exempt returns the reason why a case is not tested, or "".
func (h *Harness) exempt(c *testCase) string {
	for _, e := range h.Exempt {
		if c.named(e.Rule) {
			return e.Reason
		}
	}
	return ""
}

// named reports whether name stands for the case: the id of its rule, the rule's id and name, or the path of the case, with
// or without the rule's name.
func (c *testCase) named(name string) bool {
	return name == c.rule.id || name == c.rule.id+"_"+c.rule.name || name == c.path() || name == c.rule.id+"/"+c.name
}

func (c *testCase) path() string {
	return c.rule.id + "_" + c.rule.name + "/" + strings.ReplaceAll(c.name, " ", "_")
}
