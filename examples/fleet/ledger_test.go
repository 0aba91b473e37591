package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// worst is the check's bound worked out anew: for each interval from one time to another, in rational
// numbers. It returns how much the worst one exceeds it.
func worst(r *rule, es []entry) *big.Rat {
	most := big.NewRat(-1<<62, 1)
	for _, last := range es {
		if last.Op != "take" {
			continue
		}
		for _, first := range es {
			if first.At > last.At {
				continue
			}
			net := new(big.Int)
			for _, e := range es {
				n := big.NewInt(e.N)
				switch {
				case (e.Op == "refund" || e.Op == "hold") && e.At < first.At && e.Until >= first.At:
					net.Sub(net, n) // may have come in the interval
				case e.Op == "hold":
				case e.At < first.At || e.At > last.At || e.Op == "debit" && e.At == last.At:
				case e.Op == "refund":
					net.Sub(net, n)
				default:
					net.Add(net, n)
				}
			}
			over := new(big.Rat).SetInt(net)
			over.Sub(over, big.NewRat(r.refill*int64(last.At-first.At), 1e6))
			over.Sub(over, big.NewRat(r.capacity, 1))
			if over.Cmp(most) > 0 {
				most = over
			}
		}
	}
	return most
}

// TestCheckAgainstEveryInterval compares the check with one that tries all intervals.
func TestCheckAgainstEveryInterval(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	exceeded := 0
	for range 3000 {
		r := &rule{name: "r", capacity: 1 + random.Int64N(30), refill: 1 + random.Int64N(1000)}
		es := make([]entry, 1+random.IntN(20))
		for i := range es {
			es[i] = entry{Limit: "r", Key: "k", Op: []string{"take", "take", "take", "debit", "refund", "hold"}[random.IntN(6)],
				N: 1 + random.Int64N(10), At: 1_000_000 + quota.Micros(random.Int64N(15)*random.Int64N(20_000))}
			if es[i].Op == "refund" && random.IntN(3) == 0 || es[i].Op == "hold" {
				es[i].Until = es[i].At + quota.Micros(random.Int64N(100_000))
			}
		}
		want := worst(r, es)
		f := finding{rule: r}
		f.add("k", append([]entry(nil), es...))
		if got := f.excess != ""; got != (want.Sign() > 0) {
			t.Fatalf("capacity %d, %d a second: %+v\nexceeded by %v; the check says %q", r.capacity, r.refill, es, want, f.excess)
		}
		if f.excess != "" {
			exceeded++
		}
	}
	if exceeded < 500 || exceeded > 2500 {
		t.Errorf("%d of 3000 cases exceed the bound: the cases show little", exceeded)
	}
}

// TestCheckAcceptsTheAlgorithm runs random charges through the real token bucket, many of them in one
// microsecond, and writes them down in any order, as processes would: the check must never complain.
func TestCheckAcceptsTheAlgorithm(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	nearly := 0
	for round := range 3000 {
		r := newRule("r", 1+random.Int64N(100), 1+random.Int64N(2000))
		c := quota.Charge{Limit: r.limit, Key: "k"}
		var item driver.Item
		var es []entry
		var receipts []quota.Decision
		now := quota.Micros(1_000_000)
		for range 100 {
			now += quota.Micros(random.Int64N(3) * random.Int64N(5000))
			charge := c
			charge.Cost = 1 + random.Int64N(30)
			switch {
			case random.IntN(8) == 0:
				charge.Op = quota.OpDebit
			case random.IntN(4) == 0 && len(receipts) > 0:
				i := random.IntN(len(receipts))
				charge = c.Refund(receipts[i], 1+random.Int64N(receipts[i].Charged))
				receipts = append(receipts[:i], receipts[i+1:]...)
			}
			var d quota.Decision
			if err := driver.ApplyOne(&charge, &item, now, &d); err != nil {
				t.Fatal(err)
			}
			if !d.Allowed {
				continue
			}
			if charge.Op == quota.OpTake && random.IntN(10) == 0 { // given back: at once, or after a while with others in between
				hold := c.Refund(d, d.Charged)
				held := now
				for range random.IntN(4) {
					now += quota.Micros(random.Int64N(5000))
					between := c
					between.Cost = 1 + random.Int64N(30)
					var d quota.Decision
					if err := driver.ApplyOne(&between, &item, now, &d); err == nil && d.Allowed {
						es = append(es, entry{Limit: "r", Key: "k", Op: "take", N: between.Cost, At: now})
						receipts = append(receipts, d)
					}
				}
				if err := driver.ApplyOne(&hold, &item, now, new(quota.Decision)); err != nil {
					t.Fatal(err)
				}
				es = append(es, entry{Limit: "r", Key: "k", Op: "hold", N: charge.Cost, At: held, Until: now})
				continue
			}
			e := entry{Limit: "r", Key: "k", Op: charge.Op.String(), N: charge.Cost, At: now}
			switch {
			case charge.Op != quota.OpRefund:
				receipts = append(receipts, d)
			case random.IntN(5) == 0: // its outcome got lost
				e.At, e.Until = charge.MadeAt, quota.Forever
			case random.IntN(5) == 0:
				e.At, e.Until = charge.MadeAt, now+quota.Micros(random.Int64N(1000))
			}
			es = append(es, e)
		}
		if len(es) == 0 {
			continue
		}
		random.Shuffle(len(es), func(i, j int) { es[i], es[j] = es[j], es[i] })
		f := finding{rule: r}
		f.add("k", es)
		if f.excess != "" {
			t.Fatalf("round %d, capacity %d, %d a second: %s", round, r.capacity, r.refill, f.excess)
		}
		if f.peak >= r.capacity-1 {
			nearly++
		}
	}
	if nearly < 300 {
		t.Errorf("only %d of 3000 rounds came near the bound", nearly)
	}
}

func TestCheckIsExact(t *testing.T) {
	// 100 at once, then one each 10 ms, is all that 100 and 100 a second allow; one microsecond sooner is not.
	r := &rule{name: "r", capacity: 100, refill: 100}
	es := []entry{{Op: "take", N: 100, At: 1_000_000}}
	for i := range 1000 {
		es = append(es, entry{Op: "take", N: 1, At: 1_010_000 + quota.Micros(i)*10_000})
	}
	f := finding{rule: r}
	f.add("k", append([]entry(nil), es...))
	if f.excess != "" || f.peak != 100 {
		t.Errorf("peak %d, %s", f.peak, f.excess)
	}
	es[700].At--
	f = finding{rule: r}
	f.add("k", es)
	if !strings.Contains(f.excess, "0.000100 tokens too many") {
		t.Errorf("a charge one microsecond early: %q", f.excess)
	}
}

func TestEntriesOf(t *testing.T) {
	agent := quota.Charge{Limit: agentTokens.limit, Key: "team-1/agent-1", Cost: 7}
	fleet := quota.Charge{Limit: fleetTokens.limit, Key: "fleet", Cost: 7}
	refund := quota.Charge{Limit: fleetTokens.limit, Key: "fleet", Cost: 3, Op: quota.OpRefund, MadeAt: 50}
	debit := quota.Charge{Limit: fleetTokens.limit, Key: "fleet", Cost: 3, Op: quota.OpDebit}
	lost := fmt.Errorf("%w: EOF", quota.ErrIndeterminate)
	both := []quota.Decision{{Allowed: true, At: 90}, {Allowed: true, At: 91}}
	split := []quota.Decision{{At: 90, Split: true}, {Allowed: true, At: 91, Split: true}}
	for name, test := range map[string]struct {
		charges []quota.Charge
		result  quota.Result
		err     error
		want    []entry
	}{
		"granted": {[]quota.Charge{agent, fleet}, quota.Result{Granted: true, Decisions: both}, nil,
			[]entry{{"agent", "team-1/agent-1", "take", 7, 90, 0}, {"fleet", "fleet", "take", 7, 91, 0}}},
		"denied":         {[]quota.Charge{agent, fleet}, quota.Result{Decisions: []quota.Decision{{}, {Allowed: true}}}, nil, nil},
		"refund":         {[]quota.Charge{refund}, quota.Result{Granted: true, Decisions: both[:1]}, nil, []entry{{"fleet", "fleet", "refund", 3, 90, 0}}},
		"failed":         {[]quota.Charge{refund}, quota.Result{}, quota.ErrUnavailable, nil},
		"take, unknown":  {[]quota.Charge{agent, fleet}, quota.Result{}, lost, nil},
		"debit, unknown": {[]quota.Charge{debit}, quota.Result{}, lost, nil},
		"refund, unknown": {[]quota.Charge{refund}, quota.Result{}, lost,
			[]entry{{"fleet", "fleet", "refund", 3, 50, quota.Forever}}},
		"split and denied": {[]quota.Charge{agent, fleet}, quota.Result{Decisions: split}, nil,
			[]entry{{"fleet", "fleet", "hold", 7, 91, 1092}}},
	} {
		if got := entriesOf(test.charges, test.result, test.err, time.Millisecond); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: %+v, want %+v", name, got, test.want)
		}
	}
}

func TestLedgerLines(t *testing.T) {
	entries := []entry{{"agent", "team-1/agent-1", "take", 7, 1_795_000_000_000_000, 0}, {"fleet", "x\"\n\\", "refund", 1000, 1, quota.Forever}}
	var b bytes.Buffer
	if err := encode(&b, entries); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "l")
	if err := os.WriteFile(name, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readLedgers([]string{name, name})
	if err != nil || !reflect.DeepEqual(got, append(entries, entries...)) {
		t.Errorf("%+v, %v", got, err)
	}

	good := `{"limit":"agent","key":"k","op":"take","n":1,"at":5}`
	if _, err := decode([]byte(good)); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{
		"", "\n", "x", "null", "[]", good[:20], good + good, good + " x",
		strings.Replace(good, "agent", "other", 1), strings.Replace(good, "take", "give", 1), strings.Replace(good, `"n":1`, `"n":0`, 1),
		strings.Replace(good, `"n":1`, `"n":-1`, 1), strings.Replace(good, `"n":1`, `"n":1001`, 1), strings.Replace(good, `"n":1`, `"n":1e99`, 1),
		strings.Replace(good, `"at":5`, `"at":0`, 1), strings.Replace(good, `"at":5`, `"at":9000000000000000000`, 1),
		strings.Replace(good, `"at":5`, `"at":5,"until":4`, 1), strings.Replace(good, `"at":5`, `"at":5,"more":4`, 1),
	} {
		if e, err := decode([]byte(bad)); err == nil {
			t.Errorf("%s: accepted as %+v", bad, e)
		}
	}
	if err := os.WriteFile(name, []byte(good+"\n"+good[:10]), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readLedgers([]string{name}); err == nil || !strings.Contains(err.Error(), name+":2:") {
		t.Errorf("a cut-off line: %v", err)
	}
	if _, err := readLedgers([]string{name + "x"}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestCheckOfNothing(t *testing.T) {
	var b bytes.Buffer
	if code := report(&b, check(nil)); code != 1 || !strings.Contains(b.String(), "nothing to check") {
		t.Errorf("exit status %d\n%s", code, &b)
	}
}
