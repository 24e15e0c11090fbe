"""A local Hugging Face Hub: the part of its HTTP protocol that downloads and uploads of models use."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import yaml

TOKEN = 'hf_loopback'


def blob_id(content):
    """Compute the name of a small file on the Hub, the name of its git blob."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Repository:
    def __init__(self, private=False):
        self.private = private
        self.commits, self.branch, self.tags = {}, None, {}

    def commit(self, files):
        """Commit files, given as path to content, on top of the last commit."""
        files = {**self.commits.get(self.branch, {}), **files}
        names = ''.join(f'{path} {hashlib.sha1(content).hexdigest()}' for path, content in sorted(files.items()))
        self.branch = hashlib.sha1(f'{len(self.commits)}{names}'.encode()).hexdigest()
        self.commits[self.branch] = files
        return self.branch

    def resolve(self, revision):
        commit = self.branch if revision == 'main' else self.tags.get(revision, revision)
        return commit if commit in self.commits else None


class Hub(ThreadingHTTPServer):
    """Server that runs until ``close``.

    Attributes:
        repositories: Repositories by id.
        requests: Method and path of each request.
        ranges: First byte of each requested file.
        status: HTTP status of each request for weights, in place of the file; None sends the file.
        cut: Number of bytes of the weights after which the server closes the connection, once.
        delay: Seconds before each response.
        announced: Number of bytes by which the announced size of the weights is too large.
        damage: Offset of the byte of the weights that is sent inverted.
    """

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(('127.0.0.1', port), Handler)
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()

    def reset(self):
        self.repositories, self.objects, self.requests, self.ranges = {}, {}, [], []
        self.status, self.cut, self.delay, self.announced, self.damage = None, None, 0, 0, None

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'

    def host(self, repo_id, folder, **kwargs):
        """Commit the files of a folder to a repository."""
        repository = self.repositories.setdefault(repo_id, Repository(**kwargs))
        repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
        return repository

    def downloads(self):
        return [path for method, path in self.requests if method == 'GET' and path.endswith('.safetensors')]

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.path = unquote(self.path).partition('?')[0]
        self.server.requests.append((self.command, self.path))
        time.sleep(self.server.delay)
        length = int(self.headers.get('Content-Length') or 0)
        self.body = self.rfile.read(length)
        for pattern, handle in ROUTES.items():
            if match := re.fullmatch(pattern, f'{self.command} {self.path}'):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    handle(self, *match.groups())
                return
        self.respond(501, {'error': f'{self.command} {self.path} is not served here'})

    do_HEAD = do_POST = do_PUT = do_GET

    def respond(self, status, content=None, **headers):
        body = b'' if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def repository(self, repo_id, write=False):
        """Find the repository; None after a response with the reason."""
        repository = self.server.repositories.get(repo_id)
        known = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        if (write or repository is None or repository.private) and not known:
            self.respond(401, {'error': 'Invalid username or password.'}, X_Error_Code='RepoNotFound')
        elif repository is None:
            self.respond(404, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
        else:
            return repository

    def resolve(self, repo_id, revision, path):
        repository = self.repository(repo_id)
        if repository is None:
            return
        commit = repository.resolve(revision)
        if commit is None:
            return self.respond(404, {'error': f'Invalid rev id: {revision}'}, X_Error_Code='RevisionNotFound')
        content = repository.commits[commit].get(path)
        if content is None:
            return self.respond(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound')
        headers = {'X-Repo-Commit': commit, 'ETag': f'"{blob_id(content)}"', 'Accept-Ranges': 'bytes'}
        size = len(content)
        weights = path.endswith('.safetensors')
        if weights:
            if self.server.status is not None:
                return self.respond(self.server.status, {'error': 'as the test wants it'})
            size += self.server.announced
            headers |= {'X-Linked-Etag': f'"{hashlib.sha256(content).hexdigest()}"', 'X-Linked-Size': str(size)}
            if self.server.damage is not None:
                content = bytearray(content)
                content[self.server.damage] ^= 0xFF
        start = int((self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').partition('-')[0])
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Length', str(size if self.command == 'HEAD' else len(content) - start))
        self.end_headers()
        if self.command == 'GET':
            end = len(content)
            self.server.ranges.append(start)
            if weights and self.server.cut is not None:
                end, self.server.cut, self.close_connection = self.server.cut, None, True
            self.wfile.write(content[start:end])

    def info(self, repo_id, revision='main'):
        repository = self.repository(repo_id)
        if repository is not None:
            commit = repository.resolve(revision)
            files = repository.commits.get(commit, {})
            siblings = [{'rfilename': path} for path in files]
            self.respond(200, {'id': repo_id, 'sha': commit, 'private': repository.private, 'siblings': siblings})

    def refs(self, repo_id):
        repository = self.repository(repo_id)
        if repository is not None:
            refs = {'branches': [{'name': 'main', 'ref': 'refs/heads/main', 'targetCommit': repository.branch}]}
            refs['tags'] = [
                {'name': name, 'ref': f'refs/tags/{name}', 'targetCommit': commit}
                for name, commit in repository.tags.items()
            ]
            self.respond(200, {**refs, 'converts': []})

    def paths_info(self, repo_id, revision):
        repository = self.repository(repo_id)
        if repository is not None:
            files = repository.commits.get(repository.resolve(revision), {})
            found = [(path, files[path]) for path in parse_qs(self.body.decode())['paths'] if path in files]
            infos = []
            for path, content in found:
                infos.append({'type': 'file', 'path': path, 'size': len(content), 'oid': blob_id(content)})
                if path.endswith('.safetensors'):
                    oid = hashlib.sha256(content).hexdigest()
                    infos[-1]['lfs'] = {'oid': oid, 'size': len(content), 'pointerSize': 134}
            self.respond(200, infos)

    def create(self):
        wanted = json.loads(self.body)
        repo_id = f'{wanted["organization"]}/{wanted["name"]}'
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.respond(401, {'error': 'Invalid username or password.'})
        if repo_id in self.server.repositories:
            return self.respond(409, {'error': 'You already created this model repo'})
        private = wanted.get('private', wanted.get('visibility') == 'private')
        self.server.repositories[repo_id] = Repository(private=bool(private))
        self.server.repositories[repo_id].commit({'.gitattributes': b'*.safetensors filter=lfs\n'})
        self.respond(200, {'url': f'{self.server.url}/{repo_id}', 'name': repo_id, 'id': repo_id})

    def validate_yaml(self):
        text = json.loads(self.body)['content']
        match = re.match(r'---\n(.*?)\n---\n', text, flags=re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
        errors = [] if metadata.get('license') else [{'message': '"license" is required'}]
        self.respond(400 if errors else 200, {'errors': errors, 'warnings': []})

    def preupload(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        if repository is not None:
            files, modes = repository.commits.get(repository.resolve(revision), {}), []
            for file in json.loads(self.body)['files']:
                path, lfs = file['path'], file['path'].endswith('.safetensors')
                modes.append({'path': path, 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False})
                if path in files:
                    oid = hashlib.sha256(files[path]).hexdigest() if lfs else blob_id(files[path])
                    modes[-1]['oid'] = oid
            self.respond(200, {'files': modes})

    def lfs_batch(self, repo_id):
        repository = self.repository(repo_id, write=True)
        if repository is not None:
            objects = []
            for wanted in json.loads(self.body)['objects']:
                objects.append({'oid': wanted['oid'], 'size': wanted['size']})
                if wanted['oid'] not in self.server.objects:
                    upload = {'href': f'{self.server.url}/lfs/{wanted["oid"]}', 'header': {}}
                    objects[-1]['actions'] = {'upload': upload}
            self.respond(200, {'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid):
        right = hashlib.sha256(self.body).hexdigest() == oid
        if right:
            self.server.objects[oid] = self.body
        self.respond(200 if right else 400)

    def commit(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        if repository is not None:
            files = {}
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item['value']
                if item['key'] == 'file':
                    files[value['path']] = base64.b64decode(value['content'])
                if item['key'] == 'lfsFile':
                    files[value['path']] = self.server.objects[value['oid']]
            commit = repository.commit(files)
            self.respond(200, {'commitUrl': f'{self.server.url}/{repo_id}/commit/{commit}', 'commitOid': commit})

    def tag(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        if repository is not None:
            name = json.loads(self.body)['tag']
            if name in repository.tags:
                return self.respond(409, {'error': 'Tag reference exists already'})
            repository.tags[name] = repository.resolve(revision)
            self.respond(200)


REPO = '([^/]+/[^/]+)'
ROUTES = {
    f'(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)': Handler.resolve,
    f'GET /api/models/{REPO}': Handler.info,
    f'GET /api/models/{REPO}/revision/(.+)': Handler.info,
    f'GET /api/models/{REPO}/refs': Handler.refs,
    f'POST /api/models/{REPO}/paths-info/(.+)': Handler.paths_info,
    'POST /api/repos/create': Handler.create,
    'POST /api/validate-yaml': Handler.validate_yaml,
    f'POST /api/models/{REPO}/preupload/(.+)': Handler.preupload,
    f'POST /{REPO}\\.git/info/lfs/objects/batch': Handler.lfs_batch,
    'PUT /lfs/(.+)': Handler.lfs_put,
    f'POST /api/models/{REPO}/commit/(.+)': Handler.commit,
    f'POST /api/models/{REPO}/tag/(.+)': Handler.tag,
}
