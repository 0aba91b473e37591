package clienttest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

const (
	// backWithin is how soon the keys of a master are decided by the store again, once the cluster is whole.
	backWithin  = 2 * time.Second
	loadWorkers = 4 // goroutines of a load
	// few is the size of the limit of which the other masters' keys must not get more.
	few = 5
)

// pauseOfLoad is the pause of a load's goroutine between two calls: the machine must have time to spare.
func pauseOfLoad() time.Duration { return spared(25*time.Millisecond, 60*time.Millisecond) }

// outages are the ways in which one of three masters fails. Normal runs take those of the sample.
var outages = []struct {
	fault   string
	replica bool
	sample  bool
}{
	{"killed", false, true},
	{"killed", true, false},
	{"hung", false, false},
	{"hung", true, true},
	{"slow", false, true},
	{"slow", true, false},
}

// policies open a store, through the policies that a program may have, with their defaults.
var policies = []struct {
	name string
	open func(t *testing.T, l library, url string, tell func(quota.Notice)) quota.Store
}{
	// Its calls to the keys of one master fill the bound: a bound for all nodes would refuse the others.
	{"FailWithError", standardOf(resilience.FailWithError(), loadWorkers)},
	{"FailOpen", standard(resilience.FailOpen(nil))},
	{"FailClosed", standard(resilience.FailClosed(nil))},
	{"Fallback", func(t *testing.T, l library, url string, tell func(quota.Notice)) quota.Store {
		return standard(resilience.Fallback(local.New(), resilience.Instances(4), nil))(t, l, url, tell)
	}},
	{"FromEnv", fromEnvironment("")},
	{"FromEnv, a fleet of 4", fromEnvironment("4")},
}

func fromEnvironment(fleet string) func(*testing.T, library, string, func(quota.Notice)) quota.Store {
	return func(t *testing.T, l library, url string, _ func(quota.Notice)) quota.Store { // it logs its notices
		return storeFromEnv(t, by(url, l.name), fleet)
	}
}

func standard(p resilience.Policy) func(*testing.T, library, string, func(quota.Notice)) quota.Store {
	return standardOf(p, 0)
}

func standardOf(p resilience.Policy, inFlight int) func(*testing.T, library, string, func(quota.Notice)) quota.Store {
	return func(t *testing.T, l library, url string, tell func(quota.Notice)) quota.Store {
		s, err := resilience.Standard(l.open(t, url), p, &resilience.StandardOptions{InFlight: inFlight, Notice: tell})
		ok(t, err)
		t.Cleanup(func() { s.Close() })
		return s
	}
}

// environment is held while a test that runs beside others sets variables.
var environment sync.Mutex

// storeFromEnv returns the store of fleetquota.FromEnv.
func storeFromEnv(t *testing.T, url, fleet string) quota.Store {
	t.Helper()
	environment.Lock()
	defer environment.Unlock()
	for name, value := range map[string]string{"REDIS_URL": url, "FLEET_SIZE": fleet} {
		before, was := os.LookupEnv(name)
		os.Setenv(name, value)
		defer func() {
			os.Setenv(name, before)
			if !was {
				os.Unsetenv(name)
			}
		}()
	}
	limiter, err := fleetquota.FromEnv(t.Context())
	ok(t, err)
	t.Cleanup(func() { limiter.Close() })
	return limiter.Store()
}

// outageMasters has one of three masters fail and come back, under each policy. Calls to keys of the other masters must not
// notice: there are no more errors, decisions in the store's place and calls above the timeout than in a cluster
// without a failure that has the same calls at the same time. The keys of the master must be the store's again soon
// after the cluster is whole.
func outageMasters(t *testing.T, l library) {
	t.Parallel()
	control := startSite(t, l, "control")
	control.run(t)
	t.Run("cluster", func(t *testing.T) { // returns when all have ended
		for _, o := range outages {
			if !o.sample && !testenv.Full() {
				continue
			}
			name := o.fault + " without replica"
			if o.replica {
				name = o.fault + " with replica"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				outageOf(t, l, control, o.fault, o.replica)
			})
		}
	})
}

func outageOf(t *testing.T, l library, control *outageSite, fault string, replica bool) {
	s := startSite(t, l, fault)
	if !replica {
		replicas, err := s.Replicas(s.victim)
		ok(t, err)
		for _, r := range replicas {
			r.Kill()
		}
	}
	s.run(t)
	began := time.Now()
	pause := func(ms, full int) { time.Sleep(time.Duration(sized(ms, full)) * time.Millisecond) }
	pause(1000, 10_000)

	var whole []span // the times in which the master's keys are the store's
	s.at = time.Now()
	end := s.fail(t, fault)
	if replica && fault != "slow" {
		ok(t, s.WaitOK())
		from := time.Now()
		pause(2500, 20_000)
		whole = append(whole, span{from.Add(backWithin), time.Now()})
	} else {
		pause(2000, 20_000)
	}
	end()
	ok(t, s.WaitOK())
	from := time.Now()
	pause(2500, 28_000)
	whole = append(whole, span{from.Add(backWithin), time.Now()})
	during := span{began, time.Now()}
	s.stop()

	t.Logf("whole again %v after the failure", from.Sub(s.at).Round(10*time.Millisecond))
	admitted := 0
	for i, p := range s.loads {
		c := control.loads[i]
		missed, usual := p.others.missed(during), c.others.missed(during)
		odd := control.unexplained(missed)
		t.Logf("%s: of %d calls to keys of the other masters %d were missed, %d of them while the control did not stall, and %d in the control; the slowest took %v",
			p.name, p.others.count(), len(missed), len(odd), len(usual), p.others.slowest.Round(time.Millisecond))
		t.Logf("%s: of %d calls to keys of the master %d were missed, the last %v after the cluster was whole",
			p.name, p.own.count(), len(p.own.missed(during)), p.own.last(span{whole[0].from.Add(-backWithin), whole[0].until}).Round(10*time.Millisecond))
		if len(odd) > len(usual) {
			t.Errorf("%s: calls to keys of the other masters without a decision by the store in time, while the control did not stall: got %d, want at most %d as in the control; %s",
				p.name, len(odd), len(usual), list(s.at, odd))
		}
		if n := len(p.own.missed(during)); n == 0 {
			t.Errorf("%s: calls to the master's keys without a decision by the store: got none, want some, or the test proves nothing", p.name)
		}
		for _, w := range whole {
			if late, usual := control.unexplained(p.own.missed(w)), c.own.missed(w); len(late) > len(usual) {
				t.Errorf("%s: calls to the master's keys %v after the cluster was whole without a decision by the store: got %d, want at most %d as in the control; %s",
					p.name, backWithin, len(late), len(usual), list(s.at, late))
			}
		}
		if t.Failed() {
			p.mu.Lock()
			t.Logf("%s: notices: %s", p.name, list(s.at, p.notices))
			p.mu.Unlock()
		}
		p.own.answered(t, p.name)
		admitted += p.others.few - len(p.others.missed(span{until: during.until}))
	}
	if most := few * len(s.others); admitted > most {
		t.Errorf("tokens of the small limit granted for keys of the other masters: got %d, want at most %d", admitted, most)
	}
}

// outageSite is a cluster with loads through all policies: each to the keys of one master, and to those of the others.
type outageSite struct {
	*redisserver.Cluster
	victim      *redisserver.Node
	own, others []string
	loads       []*outageLoad
	at          time.Time // of the failure
	stop        func()
}

type outageLoad struct {
	name        string
	store       quota.Store
	own, others *outageCalls
	mu          sync.Mutex
	notices     []outageCall // for the text of a failure
}

func (o *outageLoad) tell(n quota.Notice) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.notices = append(o.notices, outageCall{at: time.Now(), key: n.Text, outcome: fmt.Sprint(n.Err)})
}

func startSite(t *testing.T, l library, name string) *outageSite {
	s := &outageSite{Cluster: redisserver.StartCluster(t, "--cluster-require-full-coverage", "no")}
	var err error
	s.victim, err = s.MasterFor(stateOf("team-0"))
	ok(t, err)
	for _, k := range keys(48) {
		if n, err := s.MasterFor(stateOf(k)); err == nil && n == s.victim {
			s.own = append(s.own, k)
		} else {
			s.others = append(s.others, k)
		}
	}
	for _, p := range policies {
		load := &outageLoad{name: p.name, own: &outageCalls{}, others: &outageCalls{}}
		load.store = p.open(t, l, clusterURL(s.Cluster, ""), load.tell)
		s.loads = append(s.loads, load)
	}
	return s
}

// run makes calls until stop. It returns when each store has decided some.
func (s *outageSite) run(t *testing.T) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	s.stop = sync.OnceFunc(func() { close(done); wg.Wait() })
	t.Cleanup(s.stop)
	for _, load := range s.loads {
		until(t, "the first decision", func() bool {
			_, err := (fromStore{load.store}).Charge(bg, quota.Charge{Limit: counted(plenty), Key: s.own[0]})
			return err == nil
		})
		load.own.load(load.store, s.own, loadWorkers, done, &wg)
		load.others.load(load.store, s.others, loadWorkers, done, &wg)
	}
	for _, load := range s.loads {
		until(t, "the store to name its nodes", func() bool { return len(resilience.BreakerStates(load.store)) > 3 })
		until(t, "calls", func() bool { return load.own.count() > 50 && load.others.count() > 50 })
	}
}

// unexplained returns those of the calls missed elsewhere during which no call here stalled, nor shortly before for so long that it opened
// a breaker. A loaded machine stalls by itself.
func (s *outageSite) unexplained(missed []outageCall) []outageCall {
	var stalls []outageCall
	for _, load := range s.loads {
		for _, y := range []*outageCalls{load.own, load.others} {
			stalls = append(stalls, y.stalled()...)
		}
	}
	return unexplained(missed, stalls)
}

func unexplained(missed, stalls []outageCall) []outageCall {
	return slices.DeleteFunc(missed, func(c outageCall) bool {
		return slices.ContainsFunc(stalls, func(s outageCall) bool {
			end := s.at.Add(s.took)
			if s.took > resilience.DefaultTimeout*3/4 {
				end = end.Add(time.Second)
			}
			return s.at.Before(c.at.Add(c.took)) && c.at.Before(end)
		})
	})
}

// fail has the master fail, and returns a function that ends the failure.
func (s *outageSite) fail(t *testing.T, fault string) (end func()) {
	switch fault {
	case "killed":
		s.victim.Kill()
		return func() { ok(t, s.victim.Restart()) }
	case "hung":
		ok(t, s.victim.Pause())
		return func() { ok(t, s.victim.Resume()) }
	}
	// Replies come later than the timeout by 300 ms at most, which is not long enough for the others to take the master for
	// dead.
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			for _, step := range []struct {
				do func() error
				d  time.Duration
			}{{s.victim.Pause, resilience.DefaultTimeout + 300*time.Millisecond}, {s.victim.Resume, 100 * time.Millisecond}} {
				if err := step.do(); err != nil {
					t.Error(err)
				}
				time.Sleep(step.d)
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	end = sync.OnceFunc(func() { close(done); wg.Wait() })
	t.Cleanup(end)
	return end
}

// list shows some calls, with their times after a failure.
func list(at time.Time, calls []outageCall) string {
	var b strings.Builder
	for i, c := range calls {
		if i == 20 {
			b.WriteString("\n…")
			break
		}
		fmt.Fprintf(&b, "\n%v after it, %s: %s, in %v", c.at.Sub(at).Round(time.Millisecond), c.key, c.outcome, c.took.Round(time.Millisecond))
	}
	return b.String()
}

// outageStall has a server stall for 700 ms, under the policies of FromEnv. Once it answers again, the store must decide again
// within a second.
func outageStall(t *testing.T, l library) {
	t.Parallel()
	const stall, goroutines, again = 700 * time.Millisecond, 16, time.Second
	server, untouched := redisserver.Start(t), redisserver.Start(t)
	done := make(chan struct{})
	var wg sync.WaitGroup
	stop := sync.OnceFunc(func() { close(done); wg.Wait() })
	t.Cleanup(stop)
	calls, control := map[string]*outageCalls{}, map[string]*outageCalls{}
	for _, fleet := range []string{"", "4"} {
		for to, made := range map[*redisserver.Server]map[string]*outageCalls{server: calls, untouched: control} {
			y := &outageCalls{}
			made[fleet] = y
			y.load(storeFromEnv(t, by("redis://"+to.Addr(), l.name), fleet), keys(20), goroutines, done, &wg)
			until(t, "calls", func() bool { return y.count() > 50 })
		}
	}
	missed := map[string]int{}
	for i := range sized(2, 10) {
		began := time.Now()
		ok(t, server.Pause())
		time.Sleep(stall)
		ok(t, server.Resume())
		end := time.Now()
		time.Sleep(again + 2*time.Second)
		after := span{end.Add(again), time.Now()}
		for fleet, y := range calls {
			t.Logf("stall %d, FLEET_SIZE=%s: %d calls missed, the last %v after its end", i, fleet, len(y.missed(span{began, after.until})), y.last(span{end, after.until}).Round(time.Millisecond))
			if missed, usual := unexplained(y.missed(after), control[fleet].stalled()), control[fleet].missed(after); len(missed) > len(usual) {
				t.Errorf("FLEET_SIZE=%s: calls %v after the end of a stall without a decision by the store in time: got %d, want at most %d as in the control; %s",
					fleet, again, len(missed), len(usual), list(end, missed))
			}
			// However slow the machine is, and however much that explains.
			if !y.decidedSince(after.from) && control[fleet].decidedSince(after.from) {
				t.Errorf("FLEET_SIZE=%s: calls that the store decided from %v to %v after the end of a stall: got none, want some, as in the control", fleet, again, after.until.Sub(end))
			}
			missed[fleet] += len(y.missed(span{began, end}))
		}
	}
	stop()
	for fleet := range calls {
		if missed[fleet] == 0 {
			t.Errorf("FLEET_SIZE=%s: calls during the stalls without a decision by the store in time: got none, want some, or the test proves nothing", fleet)
		}
	}
}

// outageFirstCall opens stores of a cluster, before and after some nodes are gone. The first call must not wait for these.
func outageFirstCall(t *testing.T, l library) {
	t.Parallel()
	const stores, more = 8, 2 * time.Second
	c := redisserver.StartCluster(t)
	firstCalls := func() (all time.Duration) {
		for i := range stores {
			s := l.open(t, clusterURL(c, ""))
			began := time.Now()
			_, err := one(s, keys(stores)[i])
			ok(t, err)
			all += time.Since(began)
		}
		return all
	}
	whole := firstCalls()
	for _, n := range c.Nodes[3:] {
		n.Kill()
	}
	all := firstCalls()
	t.Logf("first calls of %d stores: %v, and %v with all nodes", stores, all, whole)
	if all > whole+more { // rueidis waited up to a second for each, at random
		t.Errorf("first calls of %d stores: got %v, want at most %v, which is %v more than with all nodes", stores, all, whole+more, more)
	}
}

// outageNewMaster has a master hang whose replica the client has not seen, for a replica without data is in no answer to
// CLUSTER SLOTS. The client's own table names the old master until its connections break, seconds later.
func outageNewMaster(t *testing.T, l library) {
	t.Parallel()
	most := backWithin // a few clusters beside other tests tell little of the average
	if testenv.Full() {
		most = 800 * time.Millisecond
	}
	clusters := sized(2, 8)
	waits := make(chan time.Duration, clusters)
	t.Run("cluster", func(t *testing.T) { // returns when all have ended
		for range clusters {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				c := redisserver.StartCluster(t)
				s := standard(resilience.FailWithError())(t, l, clusterURL(c, ""), nil)
				peek := quota.Charge{Limit: counted(plenty), Key: "team-0", Op: quota.OpPeek}
				decides := func() bool { _, err := s.Charge(bg, peek); return err == nil }
				until(t, "the first decision", decides)
				victim, err := c.MasterFor(stateOf("team-0"))
				ok(t, err)
				stop := make(chan struct{})
				var wg sync.WaitGroup
				for range 4 {
					wg.Go(func() {
						for {
							select {
							case <-stop:
								return
							case <-time.After(pauseOfLoad()):
								decides()
							}
						}
					})
				}
				defer wg.Wait()
				defer close(stop)
				ok(t, victim.Pause())
				ok(t, c.WaitOK())
				began := time.Now()
				until(t, "the store to find the new master", decides)
				waits <- time.Since(began)
			})
		}
	})
	close(waits)
	var all time.Duration
	for wait := range waits {
		all += wait
	}
	t.Logf("the new master was found %v after the cluster was whole, on average", (all / time.Duration(clusters)).Round(time.Millisecond))
	if all > most*time.Duration(clusters) {
		t.Errorf("time until the new masters were found: got %v for %d, want at most %v each", all, clusters, most)
	}
}

// fromStore is a store whose decisions in the store's place are errors.
type fromStore struct{ quota.Store }

func (s fromStore) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(ctx, c)
	if err == nil && d.Source != quota.FromStore {
		err = fmt.Errorf("decided by the %v", d.Source)
	}
	return d, err
}

// span is a time, from and until which calls begin.
type span struct{ from, until time.Time }

// outageCalls are the calls of a load. Those that the store did not decide, or not within the timeout, are missed.
type outageCalls struct {
	mu      sync.Mutex
	n       int
	few     int // granted of the small limit
	misses  []outageCall
	stalls  []outageCall // that took a quarter of the timeout
	slowest time.Duration
	tally   tally
	decided time.Time // when the latest call began that the store decided in time
}

type outageCall struct {
	at      time.Time
	took    time.Duration
	key     string
	outcome string
}

// load makes calls from some goroutines, of a limit that is never used up and of a small one.
func (y *outageCalls) load(s quota.Store, keys []string, workers int, done chan struct{}, wg *sync.WaitGroup) {
	limits := []*quota.Limit{counted(plenty), yearly("few", few)}
	for w := range workers {
		wg.Go(func() {
			for i := w; ; i += workers {
				for _, l := range limits {
					select {
					case <-done:
						return
					case <-time.After(pauseOfLoad()):
					}
					y.do(s, quota.Charge{Limit: l, Key: keys[i%len(keys)], Cost: 1})
				}
			}
		})
	}
}

func (y *outageCalls) do(s quota.Store, c quota.Charge) {
	at := time.Now()
	d, err := s.Charge(bg, c)
	took := time.Since(at)
	y.tally.add(d, err, took)
	y.mu.Lock()
	defer y.mu.Unlock()
	y.n++
	y.slowest = max(y.slowest, took)
	if c.Limit.Name() == "few" && err == nil && d.Allowed {
		y.few++
	}
	if took > resilience.DefaultTimeout/4 {
		y.stalls = append(y.stalls, outageCall{at: at, took: took})
	}
	if err != nil {
		y.misses = append(y.misses, outageCall{at, took, c.Key, err.Error()})
	} else if d.Source != quota.FromStore || took > resilience.DefaultTimeout {
		y.misses = append(y.misses, outageCall{at, took, c.Key, "decided by the " + d.Source.String()})
	} else if at.After(y.decided) {
		y.decided = at
	}
}

// decidedSince reports whether the store decided a call in time that began after a time.
func (y *outageCalls) decidedSince(t time.Time) bool {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.decided.After(t)
}

func (y *outageCalls) count() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.n
}

// stalled returns the calls that took long.
func (y *outageCalls) stalled() []outageCall {
	y.mu.Lock()
	defer y.mu.Unlock()
	return slices.Clone(y.stalls)
}

// missed returns the missed calls that began in a time.
func (y *outageCalls) missed(in span) (list []outageCall) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, c := range y.misses {
		if c.at.After(in.from) && c.at.Before(in.until) {
			list = append(list, c)
		}
	}
	return list
}

// last returns when the last missed call of a time began, since its start, and 0 for none.
func (y *outageCalls) last(in span) (last time.Duration) {
	for _, c := range y.missed(in) {
		last = max(last, c.at.Sub(in.from))
	}
	return last
}

// answered fails the test if the errors were others than a policy may give.
func (y *outageCalls) answered(t *testing.T, policy string) {
	t.Helper()
	if policy == "FailWithError" || policy == "FromEnv" {
		y.tally.only(t, quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrOverloaded)
		return
	}
	if n := y.tally.errors(); n > 0 {
		t.Errorf("%s: errors: got %d, want none but answers in the store's place: %v", policy, n, y.tally.texts)
	}
}
