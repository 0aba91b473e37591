package conformance

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// graded makes stores that decide fewer keys than any in one step.
func (m *memory) graded(a driver.Atomicity, split bool) Harness {
	h := m.harness()
	h.Name += ", " + atomicityNames[a]
	h.Fault = m.broken(&driver.Options{Atomicity: a, Split: split})
	h.Open = func(t testing.TB, o Opening) quota.Store {
		s, _ := h.Fault(t, o)
		return s
	}
	return h
}

func TestRun(t *testing.T) {
	t.Parallel()
	t.Run("any keys", func(t *testing.T) {
		t.Parallel()
		Run(t, newMemory().harness())
	})
	t.Run("any keys, in the preset", func(t *testing.T) {
		if os.Getenv("FLEETQUOTA_FULL") != "1" {
			t.Skip("package resilience runs the suite on this preset, and this test at full size")
		}
		t.Parallel()
		m := newMemory()
		preset := func(t testing.TB, s quota.Store) quota.Store {
			s, err := resilience.Standard(s, resilience.FailClosed(nil), &resilience.StandardOptions{Timeout: 10 * time.Second, Breaker: &resilience.BreakerOptions{Delay: 50 * time.Millisecond}})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		Run(t, Harness{
			Name: "NewCAS over memory in resilience.Standard",
			Open: func(t testing.TB, o Opening) quota.Store { return preset(t, m.open(t, o)) },
			Fault: func(t testing.TB, o Opening) (quota.Store, func(Fault)) {
				s, set := m.broken(nil)(t, o)
				return preset(t, s), set
			},
		})
	})
	t.Run("one group", func(t *testing.T) {
		t.Parallel()
		Run(t, newMemory().graded(driver.OneGroup, false))
	})
	t.Run("one key, lists in parts", func(t *testing.T) {
		t.Parallel()
		h := newMemory().graded(driver.OneKey, true)
		h.Lacks = []Lack{{IDs, "an id needs two keys in one step"}}
		Run(t, h)
	})
}

// The keys of the tests are keys that a store gets: valid, and each once.
func TestTexts(t *testing.T) {
	seen := map[string]bool{}
	for _, text := range texts {
		if err := quota.CheckKey(text); err != nil || seen[text] {
			t.Errorf("%.80q: got CheckKey %v and seen before %t, want nil and false", text, err, seen[text])
		}
		seen[text] = true
	}
}

func FuzzStore(f *testing.F) { Fuzz(f, newMemory().harness()) }

func BenchmarkStore(b *testing.B) { Benchmark(b, newMemory().harness()) }

// CAPABILITIES.md is of the cases that the suite has.
func TestCapabilities(t *testing.T) {
	text, err := os.ReadFile("CAPABILITIES.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := []string{"version " + Version}
	for of := cases(); len(of) > 0; {
		line, r := "- "+of[0].rule.id+": "+of[0].name, of[0].rule
		for of = of[1:]; len(of) > 0 && of[0].rule == r; of = of[1:] {
			line += ", " + of[0].name
		}
		lines = append(lines, line+"\n")
	}
	for _, want := range lines {
		if !strings.Contains(string(text), want) {
			t.Errorf("CAPABILITIES.md: got no line %q, want it; go generate ./conformance writes the file anew", want)
		}
	}
}
