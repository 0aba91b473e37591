package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// A rule is a limit kept by a token bucket, and the bucket's numbers, which the check needs.
type rule struct {
	name             string
	capacity, refill int64 // tokens; refill each second
	limit            *quota.Limit
}

func newRule(name string, capacity, refill int64) *rule {
	bucket := algorithm.TokenBucket(capacity, refill, time.Second)
	return &rule{name, capacity, refill, quota.NewLimit(name, bucket)}
}

var (
	agentTokens   = newRule("agent", 180, 30)
	agentRequests = newRule("requests", 6, 4)
	teamTokens    = newRule("team", 450, 110)
	fleetTokens   = newRule("fleet", 1300, 400)

	rules = []*rule{agentTokens, agentRequests, teamTokens, fleetTokens}
)

// An agent asks for quota, works, and settles the real cost of the work.
type agent struct {
	fleet    *fleet
	stats    *stats // of its team
	key      string // "team-1/agent-3"
	team     string // "team-1"
	everyone string // "fleet"
	think    time.Duration
}

func (a *agent) work(ctx context.Context) {
	for sleep(ctx, time.Duration(rand.ExpFloat64()*float64(a.think))) {
		if wait := a.job(ctx); wait > 0 {
			sleep(ctx, min(wait, time.Second))
		}
	}
}

// job charges one job and does it, or returns how long to wait before asking again.
func (a *agent) job(ctx context.Context) time.Duration {
	estimate := jobSize()
	charges := []quota.Charge{
		{Limit: agentTokens.limit, Key: a.key, Cost: estimate},
		{Limit: agentRequests.limit, Key: a.key, Cost: 1},
		{Limit: teamTokens.limit, Key: a.team, Cost: estimate},
		{Limit: fleetTokens.limit, Key: a.everyone, Cost: estimate},
	}
	granted, err := a.take(ctx, charges)
	a.fleet.count(a.stats, estimate, charges, granted, err)
	switch {
	case err != nil:
		return 100 * time.Millisecond
	case !granted.Granted:
		return granted.RetryAfter()
	}

	sleep(ctx, time.Duration(5+rand.IntN(60))*time.Millisecond)
	if rand.IntN(2) == 0 {
		return 0 // this one knew what it would cost
	}
	actual := max(estimate*(40+rand.Int64N(80))/100, 1)
	var corrections []quota.Charge
	for i, c := range charges {
		if c.Limit != agentRequests.limit && actual != estimate {
			corrections = append(corrections, c.Settle(granted.Decisions[i], actual))
		}
	}
	if len(corrections) > 0 {
		_, err = a.take(ctx, corrections)
		a.fleet.settled(a.stats, actual-estimate, err)
	}
	return 0
}

// take charges a list and writes the result into the ledger. The end of the run does not cancel a call that
// has begun: its outcome would be unknown.
func (a *agent) take(ctx context.Context, charges []quota.Charge) (quota.Result, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	start := time.Now()
	result, err := a.fleet.charger.ChargeAll(ctx, charges...)
	a.fleet.record(entriesOf(charges, result, err, time.Since(start)))
	return result, err
}

// jobSize returns an estimate in tokens: most jobs are small, some large, a few very large.
func jobSize() int64 {
	switch n := rand.IntN(20); {
	case n < 15:
		return 1 + rand.Int64N(25)
	case n < 19:
		return 25 + rand.Int64N(60)
	default:
		return 80 + rand.Int64N(70)
	}
}

// sleep pauses for d, and reports false if the context ended before.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// fleet is all agents, and the record of their calls.
type fleet struct {
	charger *quota.Charger
	agents  []*agent
	teams   []*stats

	mu      sync.Mutex // guards the fields below, and all stats
	entries []entry
	left    map[place]level
	lastErr error
}

// stats are the sums of a team's calls.
type stats struct {
	name                            string
	calls, admitted, failed         int64
	tokens, tokensAdmitted, settled int64            // actual costs less estimates
	deniedBy                        map[string]int64 // calls, by limit
}

// place is a limit and key.
type place struct{ limit, key string }

// level is the remainder that the latest decision reported.
type level struct {
	at        quota.Micros
	remaining int64
}

func newFleet(store quota.Store, o options) (*fleet, error) {
	charger, err := quota.NewCharger(store, nil)
	if err != nil {
		return nil, err
	}
	f := &fleet{charger: charger, left: make(map[place]level)}
	for t := range o.teams {
		team := &stats{name: fmt.Sprint("team-", t+1), deniedBy: make(map[string]int64)}
		f.teams = append(f.teams, team)
		for n := range o.agents {
			f.agents = append(f.agents, &agent{
				fleet:    f,
				stats:    team,
				key:      fmt.Sprintf("%s%s/agent-%d", o.run, team.name, n+1),
				team:     o.run + team.name,
				everyone: o.run + "fleet",
				think:    time.Duration(50+50*t) * time.Millisecond, // the first team is the busiest
			})
		}
	}
	return f, nil
}

// work lets the agents work until the context ends.
func (f *fleet) work(ctx context.Context) {
	var all sync.WaitGroup
	for _, a := range f.agents {
		all.Go(func() { a.work(ctx) })
	}
	all.Wait()
}

func (f *fleet) count(s *stats, estimate int64, charges []quota.Charge, r quota.Result, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.calls++
	s.tokens += estimate
	switch {
	case err != nil:
		s.failed++
		f.lastErr = err
		return
	case r.Granted:
		s.admitted++
		s.tokensAdmitted += estimate
	default:
		s.deniedBy[charges[r.Decider].Limit.Name()]++
	}
	for i, c := range charges {
		p, d := place{c.Limit.Name(), c.Key}, r.Decisions[i]
		if d.At >= f.left[p].at {
			f.left[p] = level{d.At, d.Remaining}
		}
	}
}

func (f *fleet) settled(s *stats, more int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.lastErr = errors.Join(errors.New("an estimate could not be settled"), err)
		return
	}
	s.settled += more
}

func (f *fleet) record(entries []entry) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.entries = append(f.entries, entries...)
}

// total returns the sum of all teams' stats. The caller holds mu.
func (f *fleet) total() *stats {
	sum := &stats{name: "fleet", deniedBy: make(map[string]int64)}
	for _, s := range f.teams {
		sum.calls += s.calls
		sum.admitted += s.admitted
		sum.failed += s.failed
		sum.tokens += s.tokens
		sum.tokensAdmitted += s.tokensAdmitted
		sum.settled += s.settled
		for limit, n := range s.deniedBy {
			sum.deniedBy[limit] += n
		}
	}
	return sum
}
