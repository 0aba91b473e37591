package conformance

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var processCases = []testCase{
	{rule: c4, name: "processes", needs: []Feature{Exact, Shared}, provisional: "1.1", run: func(t *trial) {
		t.needProcess()
		t.search(shape{kinds: random, limits: 2, keys: 3, list: 3, steps: 30, traces: 64, own: true})
	}},
	{rule: c4, name: "budget of processes", needs: []Feature{Shared}, provisional: "1.1", run: func(t *trial) {
		t.needProcess()
		budget(t)
	}},
	{rule: c4, name: "ids of processes", needs: []Feature{IDs, Shared}, provisional: "1.1", run: func(t *trial) {
		t.needProcess()
		sameID(t)
	}},
}

// needProcess has the second handles of the case opened in another process.
func (t *trial) needProcess() {
	if t.suite.h.Process == nil {
		t.skipf("Harness.Process is nil: all handles are of one process")
	}
	t.apart = true
}

// openSecond opens a second handle on data: in another process, if the case asks for it.
func (t *trial) openSecond(in *recorder, o Opening) *handle {
	if !t.apart {
		return t.openIn(in, o)
	}
	p, err := t.suite.theProcess()
	if err != nil {
		t.fatalf("another process: %v", err)
	}
	a, err := p.ask(bg, question{Do: "open", Data: o.Data})
	if err != nil {
		t.fatalf("opening a store in another process: %v", err)
	}
	t.progress.Add(1)
	return t.handle(in, &distant{t: t, process: p, handle: a.Handle, grade: a.Grade}, o)
}

// childVariable is set in a process that decides for the suite, to the name of the test that calls Run.
const childVariable = "FLEETQUOTA_CONFORMANCE_CHILD"

// answerPrefix begins the lines of the process's output that are answers.
const answerPrefix = "fleetquota-conformance: "

// question is a request to the process, as a line of JSON.
type question struct {
	Serial  int
	Do      string // open, take, chargeAll or close
	Data    string
	Handle  int
	Charges []remoteCharge
}

// remoteCharge is a charge to a limit that the process makes anew.
type remoteCharge struct {
	quota.Charge
	Recipe recipe
}

// recipe is how a limit was made.
type recipe struct {
	Name, Kind    string
	Limit, Refill int64
	Period        time.Duration
}

func (r recipe) numbers() numbers { return numbers{r.Limit, r.Refill, r.Period} }

// reply is the answer to a question.
type reply struct {
	Serial    int
	Handle    int
	Grade     driver.Atomicity
	Decisions []quota.Decision
	Error     string
	Sentinel  string // the text of the error of package quota
}

// process is the other process.
type process struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	log lastBytes // of its other output

	mu      sync.Mutex
	serial  int
	waiting map[int]chan reply
	ended   error
	done    chan struct{} // closed when it has ended
}

// theProcess returns the process, which it starts when it is first asked for.
func (s *suite) theProcess() (*process, error) {
	s.starting.Lock()
	defer s.starting.Unlock()
	if s.process != nil {
		return s.process, nil
	}
	var pattern []string
	for part := range strings.SplitSeq(s.test, "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(part)+"$")
	}
	file, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(file, "-test.run="+strings.Join(pattern, "/"), "-test.count=1"), waiting: map[int]chan reply{}, done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childVariable+"="+s.test)
	s.h.Process(p.cmd)
	p.cmd.Stderr = &p.log
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.read(out)
	s.process = p
	return p, nil
}

// endProcess ends the process, if there is one.
func (s *suite) endProcess() {
	s.starting.Lock()
	defer s.starting.Unlock()
	if s.process == nil {
		return
	}
	s.process.in.Close() // at which it ends
	select {
	case <-s.process.done:
	case <-time.After(s.patience):
		s.process.cmd.Process.Kill()
		<-s.process.done
	}
	s.process = nil
}

// read hands the answers of the process to the callers that wait for them, until it ends.
func (p *process) read(out io.Reader) {
	defer close(p.done)
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		// Other tests and the store may print too, and leave a line unfinished.
		if _, text, found := strings.Cut(line, answerPrefix); found {
			var a reply
			if json.Unmarshal([]byte(text), &a) == nil {
				p.mu.Lock()
				to := p.waiting[a.Serial]
				delete(p.waiting, a.Serial)
				p.mu.Unlock()
				if to != nil {
					to <- a
				}
			}
		} else {
			io.WriteString(&p.log, line)
		}
		if err != nil {
			break
		}
	}
	err := p.cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = fmt.Errorf("it ended, without calling Run to the end (%v), and wrote: %s", err, p.log.String())
	for _, to := range p.waiting {
		close(to)
	}
	p.waiting = nil
}

// ask asks the process and waits for the answer.
func (p *process) ask(ctx context.Context, q question) (reply, error) {
	p.mu.Lock()
	if p.ended != nil {
		defer p.mu.Unlock()
		return reply{}, p.ended
	}
	p.serial++
	q.Serial = p.serial
	to := make(chan reply, 1)
	p.waiting[q.Serial] = to
	text, err := json.Marshal(q)
	if err == nil {
		p.in.Write(append(text, '\n')) // if it fails, the process ends
	}
	p.mu.Unlock()
	if err != nil {
		return reply{}, err
	}
	select {
	case a, ok := <-to:
		if !ok {
			return reply{}, p.ended
		}
		return a, a.err()
	case <-ctx.Done():
		return reply{}, fmt.Errorf("%w: %w", quota.ErrIndeterminate, ctx.Err())
	}
}

var sentinels = []error{quota.ErrInvalid, quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrConflict, quota.ErrCrossSlot, quota.ErrOverloaded, quota.ErrMisconfigured, quota.ErrClosed}

// err returns the error of an answer.
func (a *reply) err() error {
	if a.Error == "" {
		return nil
	}
	for _, s := range sentinels {
		if a.Sentinel == s.Error() {
			return fmt.Errorf("in another process: %s (%w)", a.Error, s)
		}
	}
	return fmt.Errorf("in another process: %s", a.Error)
}

// distant is a store in the other process.
type distant struct {
	t       *trial
	process *process
	handle  int
	grade   driver.Atomicity
}

func (s *distant) Atomicity() driver.Atomicity { return s.grade }

func (s *distant) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := s.call(ctx, "take", []quota.Charge{c}, out[:])
	return out[0], err
}

func (s *distant) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.call(ctx, "chargeAll", cs, out)
}

func (s *distant) call(ctx context.Context, method string, cs []quota.Charge, out []quota.Decision) error {
	q := question{Do: method, Handle: s.handle}
	for _, c := range cs {
		s.t.mu.Lock()
		r := s.t.recipes[c.Limit]
		s.t.mu.Unlock()
		c.Limit = nil
		q.Charges = append(q.Charges, remoteCharge{c, r})
	}
	a, err := s.process.ask(ctx, q)
	if err == nil {
		copy(out, a.Decisions)
	}
	return err
}

func (s *distant) Close() error {
	_, err := s.process.ask(bg, question{Do: "close", Handle: s.handle})
	return err
}

// server is the other process's side: it opens stores and decides.
type server struct {
	t *trial

	mu     sync.Mutex
	stores map[int]quota.Store
	limits map[recipe]*quota.Limit
}

// child decides for the suite that started this process, until that closes the standard input. It returns false in a
// process of its own.
func (s *suite) child(t testing.TB) bool {
	s.test = t.Name()
	name := os.Getenv(childVariable)
	if name == t.Name() {
		s.serve(t, os.Stdin, os.Stdout)
	}
	return name != ""
}

func (s *suite) serve(t testing.TB, in io.Reader, out io.Writer) {
	served := &server{t: newTrial(s, t, cases()[0]), stores: map[int]quota.Store{}, limits: map[recipe]*quota.Limit{}}
	var wg sync.WaitGroup
	var writing sync.Mutex
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			break
		}
		wg.Go(func() {
			var q question
			a := reply{Error: "the question is not JSON"}
			if json.Unmarshal(line, &q) == nil {
				a = served.decide(q)
			}
			a.Serial = q.Serial
			text, err := json.Marshal(a)
			if err != nil {
				t.Error(err)
			}
			writing.Lock()
			defer writing.Unlock()
			fmt.Fprintf(out, "\n%s%s\n", answerPrefix, text)
		})
	}
	wg.Wait()
	served.t.root.end()
}

// decide answers a question.
func (s *server) decide(q question) (a reply) {
	done := make(chan struct{})
	go func() { // which the store may end
		defer close(done)
		defer func() {
			if v := recover(); v != nil {
				a.Error = fmt.Sprintf("panic: %v\n%s", v, stackOfPanic())
			}
		}()
		a.Error = "the goroutine was ended"
		if err := s.do(q, &a); err != nil {
			a.Error = err.Error()
			if known := driver.Sentinel(err); known != nil {
				a.Sentinel = known.Error()
			}
			return
		}
		a.Error = ""
	}()
	<-done
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	if s.t.failure != "" && a.Error != "" {
		a.Error += ": " + s.t.failure
	}
	return a
}

func (s *server) do(q question, a *reply) error {
	if q.Do == "open" {
		store := s.t.suite.h.Open(s.t.root, Opening{Data: q.Data})
		s.mu.Lock()
		defer s.mu.Unlock()
		a.Handle, a.Grade = len(s.stores)+1, driver.AtomicityOf(store)
		s.stores[a.Handle] = store
		return nil
	}
	s.mu.Lock()
	store := s.stores[q.Handle]
	cs := make([]quota.Charge, len(q.Charges))
	for i, c := range q.Charges {
		cs[i] = c.Charge
		cs[i].Limit = s.limit(c.Recipe)
	}
	s.mu.Unlock()
	a.Decisions = make([]quota.Decision, len(cs))
	switch {
	case store == nil:
		return errors.New("no such handle")
	case q.Do == "close":
		return store.Close()
	case q.Do == "take":
		var err error
		a.Decisions[0], err = store.Charge(bg, cs[0])
		return err
	}
	return store.ChargeAll(bg, cs, a.Decisions)
}

// limit returns the limit of a recipe.
func (s *server) limit(r recipe) *quota.Limit {
	if s.limits[r] == nil {
		for _, k := range slices.Concat(random, keepNone, heldKinds) {
			if k.name == r.Kind {
				s.limits[r] = s.t.named(r.Name, k, r.numbers())
			}
		}
	}
	return s.limits[r]
}

// lastBytes keeps the last bytes that are written to it.
type lastBytes struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lastBytes) Write(b []byte) (int, error) {
	const most = 1 << 12
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(b)
	if over := l.text.Len() - most; over > 0 {
		l.text.Next(over)
	}
	return len(b), nil
}

func (l *lastBytes) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(l.text.String())
}
