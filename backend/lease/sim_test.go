package lease

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unique"

	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

// A simulation runs a fleet over one store, on a clock of its own, and keeps account of the tokens that it
// admits.
type simulation struct {
	limit    *quota.Limit
	rate     float64 // tokens a second
	lifetime time.Duration
	below    *remote

	mu       sync.Mutex
	admitted []admission
	total    int64
	asked    int64
	unpaid   int64 // the most tokens admitted beyond the charged ones
	held     int64 // the most that one instance held
}

type admission struct {
	at quota.Micros
	n  int64
}

// instance takes tokens for as long as work, a rate in tokens a second over time, is not negative.
func (m *simulation) instance(s *Store, seed uint64, cost int64, work func(time.Duration) float64) {
	random := rand.New(rand.NewPCG(seed, 1))
	start := time.Now()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		rate := work(time.Since(start))
		if rate < 0 {
			return
		}
		if rate == 0 {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		time.Sleep(time.Duration(random.ExpFloat64() / rate * float64(cost) * float64(time.Second)))
		n := cost
		if cost > 1 {
			n = 1 + random.Int64N(2*cost-1)
		}
		wg.Go(func() { m.take(s, n) })
	}
}

func (m *simulation) take(s *Store, n int64) {
	ctx, cancel := context.WithTimeout(bg, 300*time.Millisecond)
	defer cancel()
	k := &taker{}
	d, err := s.Charge(context.WithValue(ctx, takerKey{}, k), quota.Charge{Limit: m.limit, Key: "fleet", Cost: n})
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked += n
	if err != nil || !d.Allowed {
		return
	}
	switch { // the tokens are admitted
	case d.Source != quota.FromLease: // when the store charged them
		m.admitted = append(m.admitted, admission{d.At, n})
	case k.sent > 0 && k.sent < n: // the lease's when the store was asked for the others
		m.admitted = append(m.admitted, admission{d.At, k.sent}, admission{quota.Micros(k.asked.UnixMicro()), n - k.sent})
	default: // now
		m.admitted = append(m.admitted, admission{quota.Micros(time.Now().UnixMicro()), n})
	}
	m.total += n
	m.unpaid = max(m.unpaid, m.total-m.below.net())
	for e := range s.table.all {
		if k := e.lease.Load(); k != nil {
			m.held = max(m.held, k.left.Load())
		}
	}
}

// check fails the test unless the bounds hold.
func (m *simulation) check(t *testing.T) {
	t.Helper()
	if m.unpaid > 0 {
		t.Errorf("tokens admitted beyond the charged ones: got %d, want 0", m.unpaid)
	}
	slices.SortFunc(m.admitted, func(a, b admission) int { return int(a.at - b.at) })
	capacity := float64(m.limit.Spec().Capacity)
	// level is the fill of a bucket that leaks at the limit's rate and never overflows: its peak is the most
	// that any interval admitted above r·Δ.
	level, peak := 0.0, 0.0
	for i, a := range m.admitted {
		if i > 0 {
			level = max(0, level-m.rate*float64(a.at-m.admitted[i-1].at)/1e6)
		}
		level += float64(a.n)
		peak = max(peak, level)
	}
	if most := capacity + m.rate*(m.lifetime.Seconds()+1e-6); peak > most {
		t.Errorf("admitted beyond r·Δ in an interval: got %.0f, want at most %.0f", peak, most)
	}
}

// fleet makes n instances on the simulation's store.
func (m *simulation) fleet(t *testing.T, n int) []*Store {
	ss := make([]*Store, n)
	for i := range ss {
		ss[i] = open(t, m.below, Options{Instances: instances(int64(n)), Lifetime: m.lifetime})
	}
	return ss
}

func newSimulation(t *testing.T, capacity, rate int64, lifetime time.Duration, seed uint64) *simulation {
	m := &simulation{limit: bucket(capacity, rate, time.Second), rate: float64(rate), lifetime: lifetime, below: newRemote(t)}
	random := rand.New(rand.NewPCG(seed, 2))
	m.below.fault = func(*quota.Charge) fault { // called under the remote's lock
		return fault{before: time.Duration(random.IntN(1000)) * time.Microsecond, after: time.Duration(random.IntN(1000)) * time.Microsecond}
	}
	return m
}

// steady is a demand that does not change until the end.
func steady(rate float64, end time.Duration) func(time.Duration) float64 {
	return func(at time.Duration) float64 {
		if at > end {
			return -1
		}
		return rate
	}
}

// onOff is a demand that comes and goes.
func onOff(rate float64, period, end time.Duration, phase float64) func(time.Duration) float64 {
	return func(at time.Duration) float64 {
		switch _, f := math.Modf(at.Seconds()/period.Seconds() + phase); {
		case at > end:
			return -1
		case f < 0.5:
			return 2 * rate
		}
		return 0
	}
}

// TestUtilisation has eight instances of uneven demand use a limit whose chunks are a fiftieth of it or less.
// They get 95 % of the tokens that the same demand gets without leases, and of the limit where they ask for
// more than that all the time. The race detector sees the charges of 5, a fifth as many: ./test runs all without it.
func TestUtilisation(t *testing.T) {
	const n, capacity, rate = 8, 2000, 1000
	end := time.Duration(sized(8, 120)) * time.Second
	costs := []int64{5, 1}
	if testenv.Race && !testenv.Full() {
		costs = costs[:1]
	}
	for _, demand := range []float64{0.6, 0.95, 1.1, 2, 5} {
		for _, shape := range []string{"steady", "on and off"} {
			for _, cost := range costs {
				t.Run(fmt.Sprintf("%s demand of %v, cost %d", shape, demand, cost), func(t *testing.T) {
					seed := seedOf(t)
					run := func(t *testing.T, leased bool) (m *simulation) {
						synctest.Test(t, func(t *testing.T) {
							m = newSimulation(t, capacity, rate, time.Second, seed)
							// The bucket starts empty, so that a full one does not hide losses.
							take(t, m.below, quota.Charge{Limit: m.limit, Key: "fleet", Cost: capacity})
							m.below.seen()
							m.below.charged = 0
							ss := m.fleet(t, n)
							var wg sync.WaitGroup
							for i, s := range ss {
								share := math.Pow(2, -float64(i)) / (2 - math.Pow(2, 1-float64(n)))
								work := steady(demand*rate*share, end)
								if shape != "steady" {
									work = onOff(demand*rate*share, time.Duration(i+2)*700*time.Millisecond, end, float64(i)/n)
								}
								if !leased {
									s.limits = map[unique.Handle[string]]bool{}
								}
								wg.Go(func() { m.instance(s, seed+uint64(i), cost, work) })
							}
							wg.Wait()
							m.check(t)
							for _, s := range ss {
								s.Close()
							}
						})
						return m
					}
					m, without := run(t, true), run(t, false)
					limit := rate * end.Seconds()
					lost := m.below.net() - m.total
					t.Logf("%.1f %% of the limit, %.1f %% without leases; at most %d held; %.1f %% of the limit lost; %.2f requests a decision",
						100*float64(m.total)/limit, 100*float64(without.total)/limit, m.held, 100*float64(lost)/limit,
						float64(len(m.below.calls))*float64(cost)/float64(m.asked))
					if m.total < without.total*95/100 {
						t.Errorf("admitted: got %d, want 95 %% or more of the %d without leases", m.total, without.total)
					}
					if shape == "steady" && demand > 1 && float64(m.total) < 0.95*limit {
						t.Errorf("admitted: got %d, want 95 %% or more of %.0f", m.total, limit)
					}
					if m.held > capacity/50 {
						t.Errorf("tokens held by an instance: got %d, want %d at most", m.held, capacity/50)
					}
					if float64(lost) > 0.05*limit {
						t.Errorf("charged and not spent: got %d, want %.0f at most", lost, 0.05*limit)
					}
				})
			}
		}
	}
}

// TestBound runs fleets whose store is slow, refuses, and loses replies, and whose instances come and go.
func TestBound(t *testing.T) {
	for range sized(8, 300) {
		seed := seedOf(t)
		random := rand.New(rand.NewPCG(seed, 3))
		n := 1 + random.IntN(8)
		capacity := int64(1) << (5 + random.IntN(10))
		rate := min(max(capacity/(1<<random.IntN(8)), 1), 500)
		lifetime := time.Duration(1+random.IntN(20)) * 100 * time.Millisecond
		end := 10 * lifetime
		name := fmt.Sprintf("%d instances, %d tokens, %d a second, leases of %v, seed %d", n, capacity, rate, lifetime, seed)
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newSimulation(t, capacity, rate, lifetime, seed)
				m.below.fault = func(*quota.Charge) fault {
					f := fault{before: time.Duration(random.Int64N(int64(lifetime) / 50)), after: time.Duration(random.Int64N(int64(lifetime) / 50))}
					switch random.IntN(20) {
					case 0:
						f.refused = true
					case 1:
						f.lost = true
					case 2:
						f.before *= 40
					case 3:
						f.after *= 40
					}
					return f
				}
				var wg sync.WaitGroup
				for i := range n {
					wg.Go(func() {
						for life := range 2 {
							s := open(t, m.below, Options{Instances: instances(int64(n)), Lifetime: lifetime})
							demand := 2 * float64(rate) * rand.New(rand.NewPCG(seed, uint64(i))).Float64()
							m.instance(s, seed+uint64(10*i+life), 1+int64(i%2)*max(capacity/40, 1), onOff(demand, lifetime*time.Duration(i+1), end/2, 0))
							s.Close()
						}
					})
				}
				wg.Wait()
				m.check(t)
				if len(m.admitted) == 0 {
					t.Error("admitted: got 0 tokens, want some")
				}
			})
		})
	}
}

// TestCrash has one instance of four vanish with its leases: it holds no more than two chunks, and the others
// use the limit up.
func TestCrash(t *testing.T) {
	const n, capacity, rate = 4, 4000, 400
	seed := seedOf(t)
	synctest.Test(t, func(t *testing.T) {
		m := newSimulation(t, capacity, rate, time.Second, seed)
		ss := m.fleet(t, n)
		down := &gate{Store: m.below} // between the store and the instance that vanishes
		ss[0].inner = down
		var wg sync.WaitGroup
		for i, s := range ss {
			wg.Go(func() { m.instance(s, seed+uint64(i), 1, steady(300, 8*time.Second)) })
		}
		time.Sleep(2*time.Second + 100*time.Millisecond)
		var held int64
		down.shut.Store(true)
		for e := range ss[0].table.all {
			if k := e.lease.Load(); k != nil {
				held = k.close() // it never spends again
			}
		}
		if held == 0 {
			t.Fatal("held by the instance that vanished: got 0, want more, else the test is void")
		}
		if held > 2*capacity/(part*n) {
			t.Errorf("held by the instance that vanished: got %d, want at most %d", held, 2*capacity/(part*n))
		}
		wg.Wait()
		m.check(t)
		for _, s := range ss[1:] {
			s.Close()
		}
		due := int64(capacity + rate*8)
		t.Logf("%d held, %d admitted of %d", held, m.total, due)
		if m.total+held < due*95/100 {
			t.Errorf("admitted and lost: got %d + %d, want 95 %% or more of %d", m.total, held, due)
		}
	})
}

// TestRefundable plays processes that take chunks, hold them and give them back at the worst times, on one
// bucket. Over any interval, the tokens they keep never exceed the tokens that the bucket alone admits.
func TestRefundable(t *testing.T) {
	for range sized(300, 20_000) {
		seed := seedOf(t)
		random := rand.New(rand.NewPCG(seed, 4))
		n := 1 + random.Int64N(4)
		capacity := part * n * (2 + random.Int64N(50))
		rate := 1 + random.Int64N(capacity)
		m := &simulation{limit: bucket(capacity, rate, time.Second), rate: float64(rate)}
		synctest.Test(t, func(t *testing.T) {
			below := newRemote(t)
			fleet := quota.Charge{Limit: m.limit, Key: "fleet"}
			ask := func(cost int64) quota.Decision {
				c := fleet
				c.Cost = cost
				return take(t, below, c)
			}
			base := time.Now()
			held := make([]*chunk, n)
			keep := func(at quota.Micros, n int64) { m.admitted = append(m.admitted, admission{at, n}) }
			giveBack := func(i int) {
				k := held[i]
				held[i] = nil
				if k == nil {
					return
				}
				back := k.refundable(k.size, int64(time.Since(base)))
				keep(k.at, k.size-back)
				take(t, below, quota.Charge{Limit: m.limit, Key: "fleet", Cost: back, Op: quota.OpRefund, MadeAt: k.at})
			}
			for range 60 {
				switch i := random.IntN(int(n)); random.IntN(6) {
				case 0, 1: // a chunk
					giveBack(i)
					if d := ask(capacity / part / n); d.Allowed {
						held[i] = &chunk{limit: m.limit, size: capacity / part / n, sent: int64(time.Since(base)), at: d.At, remaining: d.Remaining}
					}
				case 2:
					giveBack(i)
				case 3: // the bucket fills while chunks are held
					time.Sleep(time.Duration(random.Float64() * float64(capacity) / float64(rate) * float64(time.Second)))
				case 4: // and is emptied
					if d := ask(0); d.Remaining > 0 {
						keep(d.At, d.Remaining)
						ask(d.Remaining)
					}
				case 5: // all chunks come back at once, and are spent
					for i := range held {
						giveBack(i)
					}
					if d := ask(0); d.Remaining > 0 {
						keep(d.At, d.Remaining)
						ask(d.Remaining)
					}
				}
			}
			for i := range held {
				giveBack(i)
			}
			m.check(t)
		})
		if t.Failed() {
			t.Fatalf("with %d processes, capacity %d, rate %d, seed %d", n, capacity, rate, seed)
		}
	}
}
