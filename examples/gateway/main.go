// Command gateway is a gateway to language models under load: requests and tokens a minute, a budget by the month that begins on
// the 15th, and so many streams at once, for one tenant, of all of its processes together. Paid requests come before free ones.
// The models are made up, and stream their answers.
//
//	go run ./examples/gateway              in the memory of this process
//	go run ./examples/gateway -redis       four processes on a redis-server of their own
//
// A request reserves the most tokens that its answer may have, and is settled to those that it had. A quarter of the clients leave
// half-way, and in the middle of the run a gateway is killed with streams open. At the end, when the dead gateway's holds have
// lapsed, a check compares the store with all that happened: never too many streams at once, each token of the budget charged
// once, and nothing held any more. The exit status is 1 if that is not so.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/quota"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	flags := flag.NewFlagSet("gateway", flag.ExitOnError)
	redis := flags.Bool("redis", false, "start four processes on a redis-server")
	length := flags.Duration("for", 10*time.Second, "how long clients send requests")
	url := flags.String("serve", "", "be one of the processes, on the store of this `URL`")
	_ = flags.Parse(os.Args[1:])
	var err error
	switch {
	case *url != "":
		err = process(ctx, *url)
	case *redis:
		err = onRedis(ctx, *length)
	default:
		err = inMemory(ctx, *length)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		os.Exit(1)
	}
}

// member is a gateway of the fleet.
type member struct {
	addr string
	kill func()
}

// shared is a store that several gateways of this process share: Close ends it for one of them.
type shared struct {
	quota.Store
	closed atomic.Bool
}

func (s *shared) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.closed.Load() {
		return quota.Decision{}, quota.ErrClosed
	}
	return s.Store.Charge(ctx, c)
}

func (s *shared) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.closed.Load() {
		return quota.ErrClosed
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func (s *shared) Close() error {
	s.closed.Store(true)
	return nil
}

func inMemory(ctx context.Context, length time.Duration) error {
	store, err := backend.Open(ctx, "memory://")
	if err != nil {
		return err
	}
	defer store.Close()
	var f fleet
	for i := range 2 {
		g, err := serve(&shared{Store: store}, func(e event) { f.note(i, e) })
		if err != nil {
			return err
		}
		defer g.kill()
		f.members = append(f.members, member{g.addr, g.kill})
	}
	return f.run(ctx, store, length)
}

// onRedis starts a redis-server and four processes of this program.
func onRedis(ctx context.Context, length time.Duration) error {
	url, stop, err := startRedis()
	if err != nil {
		return err
	}
	defer stop()
	store, err := backend.Open(ctx, url)
	if err != nil {
		return err
	}
	defer store.Close()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var f fleet
	for i := range 4 {
		cmd := exec.Command(self, "-serve", url)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		said := bufio.NewScanner(out)
		done := make(chan struct{})
		kill := sync.OnceFunc(func() {
			_ = cmd.Process.Kill() // SIGKILL: the process settles nothing
			<-done
			_ = cmd.Wait()
		})
		if !said.Scan() {
			close(done)
			kill()
			return fmt.Errorf("process %d did not start", i)
		}
		f.members = append(f.members, member{said.Text(), kill})
		defer kill()
		go func() {
			defer close(done)
			for said.Scan() {
				if e, err := decode(said.Bytes()); err == nil {
					f.note(i, e)
				}
			}
		}()
	}
	return f.run(ctx, store, length)
}

// startRedis starts a redis-server without persistence.
func startRedis() (url string, stop func(), err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0") // for a free port
	if err != nil {
		return "", nil, err
	}
	addr := listener.Addr().String()
	listener.Close()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command("redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	for range 100 {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return "redis://" + addr + "?client=goredis", stop, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	stop()
	return "", nil, fmt.Errorf("no redis-server answers at %s", addr)
}

// process is one of the gateways of a fleet of processes. It writes its address and then its events, each in a line.
func process(ctx context.Context, url string) error {
	store, err := backend.Open(ctx, url)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	g, err := serve(store, func(e event) { _ = out.Encode(e) })
	if err != nil {
		return err
	}
	g.mu.Lock() // the address goes first
	_, err = fmt.Println(g.addr)
	g.mu.Unlock()
	<-ctx.Done()
	g.kill()
	return err
}

// fleet is the gateways, and all that they said.
type fleet struct {
	members []member

	mu     sync.Mutex
	events []event
	open   [4]int  // streams by member
	dead   [4]bool // says nothing any more
	spent  int64
	lost   int
}

func (f *fleet) note(member int, e event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead[member] {
		return
	}
	f.events = append(f.events, e)
	f.open[member] += e.Streams
	f.spent += e.Spent
	f.lost += e.Lost
}

// kill kills a member, with which its streams end. It returns how many those were.
func (f *fleet) kill(member int) int {
	defer f.members[member].kill()
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.open[member]
	f.open[member], f.dead[member] = 0, true
	f.events = append(f.events, event{At: time.Now(), Streams: -n})
	return n
}

// run puts the fleet under load, kills its last member half-way, shows the quotas each second, and checks them at the end.
func (f *fleet) run(ctx context.Context, store quota.Store, length time.Duration) error {
	limiter, err := quota.NewLimiter(&shared{Store: store}, requests, nil)
	if err != nil {
		return err
	}
	defer limiter.Close()
	counts := &tally{counts: map[[2]string]int{}}
	load, stop := context.WithTimeout(ctx, length)
	defer stop()
	var clients sync.WaitGroup
	for i := range 40 {
		tier := "free"
		if i%5 == 0 {
			tier = "paid"
		}
		clients.Go(func() { client(load, f.members, i, tier, counts) })
	}
	begin, last, orphans := time.Now(), len(f.members)-1, 0
	killed := begin.Add(length / 2)
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for load.Err() == nil {
		select {
		case <-second.C:
			if err := f.show(ctx, limiter, time.Since(begin)); err != nil {
				return err
			}
		case <-time.After(time.Until(killed)):
			killed = begin.Add(time.Hour)
			orphans = f.kill(last)
			fmt.Printf("%4.0fs  gateway %d is killed with %d streams open\n", time.Since(begin).Seconds(), last+1, orphans)
		case <-load.Done():
		}
	}
	clients.Wait()
	fmt.Printf("\n%-6s %9s %14s %7s %7s\n", "tier", "answered", "left half-way", "denied", "failed")
	for _, tier := range []string{"paid", "free"} {
		fmt.Printf("%-6s %9d %14d %7d %7d\n", tier, counts.of(tier, "answered"), counts.of(tier, "left half-way"), counts.of(tier, "denied"), counts.of(tier, "failed"))
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select { // the last streams end, and the holds of the dead gateway lapse
	case <-time.After(ttl + ttl/16 + time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	return f.check(ctx, limiter, os.Stdout, orphans)
}

// peek returns the tokens that are left of streams, tokens and budget.
func peek(ctx context.Context, limiter *quota.Limiter) (left [3]int64, err error) {
	key := quota.Key(tenant, "chat")
	r, err := limiter.ChargeAll(ctx, quota.Charge{Limit: streams, Key: key, Op: quota.OpPeek}, quota.Charge{Limit: tokens, Key: key, Op: quota.OpPeek}, quota.Charge{Limit: budget, Key: key, Op: quota.OpPeek})
	if err != nil {
		return left, err
	}
	for i := range left {
		left[i] = r.Decisions[i].Remaining
	}
	return left, nil
}

// show writes a line of the tokens and streams that are held and spent.
func (f *fleet) show(ctx context.Context, limiter *quota.Limiter, at time.Duration) error {
	left, err := peek(ctx, limiter)
	if err != nil {
		return err
	}
	f.mu.Lock()
	spent := f.spent
	f.mu.Unlock()
	gone := budget.Capacity() - left[2]
	fmt.Printf("%4.0fs  streams %2d of %d   tokens left %5d of %d   budget: spent %6d, held %5d of %d\n", at.Seconds(),
		streams.Capacity()-left[0], streams.Capacity(), left[1], tokens.Capacity(), spent, max(gone-spent, 0), budget.Capacity())
	return nil
}

// check compares the store with the events.
func (f *fleet) check(ctx context.Context, limiter *quota.Limiter, out io.Writer, orphans int) error {
	left, err := peek(ctx, limiter)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	slices.SortStableFunc(f.events, func(a, b event) int { return a.At.Compare(b.At) })
	open, most := 0, 0
	for _, e := range f.events {
		open += e.Streams
		most = max(most, open)
	}
	gone := budget.Capacity() - left[2]
	fmt.Fprintf(out, "\nstreams at once: %d at most, of %d; held now: %d\n", most, streams.Capacity(), streams.Capacity()-left[0])
	fmt.Fprintf(out, "budget: %d tokens are spent, and the gateways charged %d; %d streams of the dead gateway held up to %d, which came back\n",
		gone, f.spent, orphans, orphans*mostTokens)
	fmt.Fprintf(out, "streams that were stopped because their holds were lost: %d\n", f.lost)
	switch {
	case int64(most) > streams.Capacity():
		return fmt.Errorf("%d streams ran at once, of %d", most, streams.Capacity())
	case open != 0 || left[0] != streams.Capacity():
		return fmt.Errorf("%d streams are open and %d are held at the end", open, streams.Capacity()-left[0])
	case gone < f.spent || gone > f.spent+int64(orphans*mostTokens): // the dead gateway may have charged some without saying so
		return fmt.Errorf("the store says that %d tokens of the budget are gone, and the gateways %d", gone, f.spent)
	}
	fmt.Fprintln(out, "Nothing was over its limit, and all that was held came back.")
	return nil
}
